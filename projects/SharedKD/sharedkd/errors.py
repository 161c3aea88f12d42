"""Errors for users, one line each: the key at fault, its value, the problem and the fix."""

from functools import wraps
from typing import Any, Callable, Iterable, List, Optional, Tuple, TypeVar

__all__ = [
    "FAILED",
    "ConfigError",
    "ConfigErrors",
    "DataError",
    "Findings",
    "NonFiniteLossError",
    "RunError",
    "SharedKDError",
    "collecting",
]

_Result = TypeVar("_Result")


class SharedKDError(Exception):
    """An error that a user can fix.  The tools print it as one line, with exit status 1.

    Args:
        key: the config key or flag at fault, for example ``"model.teacher.weights"``.
        value: what the key holds.
        problem: what is wrong with it, with the value that it conflicts with.
        fix: what to do about it.

    >>> print(SharedKDError("train.seed", "x", "is no whole number", "use one"))
    train.seed=x: is no whole number; use one
    """

    def __init__(self, key: str, value: Any, problem: str, fix: str):
        super().__init__(" ".join(f"{key}={value}: {problem}; {fix}".split()))
        self.key, self.value, self.problem, self.fix = key, value, problem, fix

    @property
    def errors(self) -> List["SharedKDError"]:
        """The errors that this one consists of: itself, unless it is :class:`ConfigErrors`."""
        return [self]

    def at(self, key: str) -> "SharedKDError":
        """The same error at another ``key``."""
        return type(self)(key, self.value, self.problem, self.fix)

    def __reduce__(self) -> Tuple[type, Tuple[Any, ...]]:
        return type(self), (self.key, self.value, self.problem, self.fix)


class ConfigError(SharedKDError):
    """Something in the config, or a file that it names, cannot work; raised before training begins."""


class ConfigErrors(ConfigError):
    """Several errors at once; as text, each is a line of its own.

    Args:
        errors: the errors.
    """

    def __init__(self, errors: Iterable[SharedKDError]):
        self._errors = list(errors)
        Exception.__init__(self, "\nerror: ".join(map(str, self._errors)))

    @property
    def errors(self) -> List[SharedKDError]:
        return self._errors

    def __reduce__(self) -> Tuple[type, Tuple[Any, ...]]:
        return type(self), (self._errors,)


class RunError(SharedKDError):
    """Something went wrong in a run that had begun: a full disk, a lost process, a step that fails."""


class DataError(RunError):
    """An image cannot be read, or a loading process died, while a run trains or evaluates."""


class NonFiniteLossError(RunError, FloatingPointError):
    """A loss term became infinite or NaN: training stops before the weights are touched.

    Args:
        message: which term, at which level and iteration.
    """

    def __init__(self, message: str):
        Exception.__init__(self, message)

    def __reduce__(self) -> Tuple[type, Tuple[Any, ...]]:
        return type(self), self.args


#: What a step of :class:`Findings` returns instead of its result when there is none.
FAILED = type("Failed", (), {"__repr__": lambda self: "FAILED", "__bool__": lambda self: False})()


class Findings:
    """Runs independent checks and collects their errors, so that one run reports every mistake.

    A check is a function that raises one of the errors above.  A check that needs the result of another takes
    it as an argument, and is skipped if that one failed::

        findings = Findings()
        student = findings.step(construct, cfg.model.student, "model.student")
        teacher = findings.step(construct, cfg.model.teacher, "model.teacher")
        findings.step(compare, student, teacher)      # only if both are there
        findings.raise_errors()

    Attributes:
        errors: the errors in the order they were found, each once.
        warnings: settings that work but are probably a mistake, in the same form.
    """

    def __init__(self) -> None:
        self.errors: List[SharedKDError] = []
        self.warnings: List[SharedKDError] = []

    def step(self, function: Callable, *args: Any, **options: Any) -> Any:
        """The result of ``function(*args, **options)``, if there is one.

        :data:`FAILED` if it raises one of the errors above, or if one of ``args`` or ``options`` is
        FAILED.
        """
        if any(x is FAILED for x in (*args, *options.values())):
            return FAILED
        try:
            return function(*args, **options)
        except SharedKDError as e:
            self.add(e)
            return FAILED

    def add(self, error: SharedKDError) -> None:
        """Add ``error``, or the errors that it consists of, each once."""
        known = {str(e) for e in self.errors}
        self.errors += [e for e in error.errors if str(e) not in known]

    def warn(self, key: str, value: Any, problem: str, fix: str) -> None:
        """Add a warning, which does not stop a run."""
        self.warnings.append(ConfigError(key, value, problem, fix))

    def raise_errors(self) -> None:
        """Raise the one error there is, or all of them as :class:`ConfigErrors`; return if there is none."""
        if self.errors:
            raise self.errors[0] if len(self.errors) == 1 else ConfigErrors(self.errors)


def collecting(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Let a caller leave out ``findings``: the errors that ``function`` puts there are then raised."""

    @wraps(function)
    def wrapper(*args: Any, findings: Optional[Findings] = None, **options: Any) -> _Result:
        if findings is not None:
            return function(*args, findings=findings, **options)
        findings = Findings()
        result = function(*args, findings=findings, **options)
        findings.raise_errors()
        return result

    return wrapper
