"""The compiled module fits one minor version of torch: another one would end in an undefined symbol."""

BUILT_FOR = "2.13"


def require() -> None:
    """Imports torch. Raises ImportError, naming the version that is needed, if it is missing or has another version."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise  # a broken installation: torch says what is wrong
        raise ImportError(f"microbatch needs torch {BUILT_FOR}: pip install torch=={BUILT_FOR}.0") from error
    found = ".".join(torch.__version__.split(".")[:2])
    if found != BUILT_FOR:
        raise ImportError(
            f"this build of microbatch needs torch {BUILT_FOR}, and torch {torch.__version__} is installed: "
            f"pip install torch=={BUILT_FOR}.0, or a microbatch that was built for torch {found}"
        )
