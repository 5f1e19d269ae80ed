"""Other packages' functions under their own names and signatures, computed by the ops of this one.

A module per package, named like it. To swap a model over, change what it imports, or set the names in its module.
"""
