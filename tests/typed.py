"""The checker of annotations at run time that the tests switch on for the kernel; see addopts in pyproject.toml."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in static checking
