"""The command line: one thin command a verb, and the only room that knows all the others."""
