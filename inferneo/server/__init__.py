"""The HTTP and WebSocket server over AsyncEngine, in the shapes of the OpenAI API."""
