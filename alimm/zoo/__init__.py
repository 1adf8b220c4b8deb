"""The model zoo: what there is (``index``, cheap to import) and how a checkpoint gets here (``download``)."""

from alimm.zoo.index import ModelEntry, Result, get_entry, list_models, load_index, validate_index

__all__ = ["ModelEntry", "Result", "get_entry", "list_models", "load_index", "register", "validate_index"]


def register() -> None:
    """Make ``load_from='alimm://NAME'`` work in configs. May be called more than once."""
    # Not imported above: the index alone is quicker without what a download needs.
    from alimm.zoo.download import register as register_scheme

    register_scheme()
