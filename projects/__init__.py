"""The methods, one folder each, imported as ``alimm.projects.<method>``.

This folder is the package ``alimm.projects``: ``alimm/projects`` links to it in a checkout and ``setup.py`` maps it in
a wheel. Importing it imports no method; importing a method registers its parts and does no other work.
"""
