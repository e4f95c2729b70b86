"""What only the command line needs; `tools/__main__.py` lists every command.

No config and no other room imports anything from here.
"""
