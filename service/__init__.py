"""The online room: reads a bundle and answers over HTTP."""
