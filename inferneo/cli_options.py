"""The options that the commands share, each written once."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

_SAMPLING = "Sampling"
_ENGINE = "Engine"

Model = Annotated[str, Argument(help="A directory, a .gguf file, a hub id, or smollm2-135m-instruct.")]
Prompt = Annotated[str, Argument(help="What to continue or to answer; - reads it from standard input.")]
AsChat = Annotated[bool, Option("--chat/--raw", help="Put the prompt as a chat message, or as it stands.")]
System = Annotated[str | None, Option(help="What the model is told before the first message.")]
MaxTokens = Annotated[int, Option(help="Tokens to generate at most.")]
AnswerTokens = Annotated[int | None, Option(help="Tokens of an answer at most; otherwise until the context is full.")]

Temperature = Annotated[float, Option(help="0 always takes the likeliest token.", rich_help_panel=_SAMPLING)]
TopK = Annotated[int, Option(help="Keep the k likeliest tokens; 0 keeps all.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float, Option(help="Keep the likeliest, up to this probability.", rich_help_panel=_SAMPLING)]
MinP = Annotated[float, Option(help="Drop what is below this share of the likeliest.", rich_help_panel=_SAMPLING)]
RepetitionPenalty = Annotated[
    float, Option(help="Above 1, tokens that have occurred become less likely.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[int | None, Option(help="Fixes the draw; otherwise a fresh one.", rich_help_panel=_SAMPLING)]
Stop = Annotated[list[str] | None, Option(help="End before this text. May be repeated.", rich_help_panel=_SAMPLING)]

Device = Annotated[str, Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.", rich_help_panel=_ENGINE)]
Dtype = Annotated[str, Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_ENGINE)]
Threads = Annotated[int | None, Option(help="CPU threads; otherwise every core.", rich_help_panel=_ENGINE)]
MaxModelLen = Annotated[
    int | None, Option(help="Tokens of prompt and answer; otherwise the model's limit.", rich_help_panel=_ENGINE)
]
MaxNumSeqs = Annotated[int, Option(help="Sequences in one batch at most.", min=1, rich_help_panel=_ENGINE)]

Context = Annotated[int | None, Option(min=1, help="Tokens to count memory for; otherwise the model's limit.")]
Verbose = Annotated[bool, Option("--verbose", "-v", help="Log to standard error what the engine does.")]
