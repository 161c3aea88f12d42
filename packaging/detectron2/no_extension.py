"""Takes the place of Detectron2's compiled extension, installed as ``detectron2._C``."""


def get_compiler_version():
    return "none, pure-Python build"


def get_cuda_version():
    return "none, pure-Python build"


def has_cuda():
    return False


def __getattr__(name):
    # AttributeError and nothing else: hasattr() and the tools that look at every module rely on it.
    raise AttributeError(
        f"detectron2._C.{name} needs Detectron2's compiled extension, which this pure-Python build "
        "lacks: install Detectron2 from its own sources"
    )
