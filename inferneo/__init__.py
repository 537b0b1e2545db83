"""What of Inferneo speaks to the terminal. The engine itself is `inferneo_core`.

Importing this package loads neither torch nor the engine.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
