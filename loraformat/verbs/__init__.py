"""What can be done with adapters and bases: one verb a module, the function of the same name in each.

They lie in a package of their own because ``loraformat.merge`` is the function; a module beside it would shadow it.
"""
