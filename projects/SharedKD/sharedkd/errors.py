"""The one error that users see, a line that names the config key, what is wrong and the fix; and many."""

from functools import wraps
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, TypeVar

__all__ = [
    "FAILED",
    "ConfigError",
    "ConfigErrors",
    "DataError",
    "Findings",
    "collecting",
    "NonFiniteLossError",
]

_Result = TypeVar("_Result")


class ConfigError(Exception):
    """Something the user wrote, or points at, cannot work.  The tools print it as one line, exit status 1.

    Args:
        key: the config key at fault, for example ``"model.teacher.weights"``.
        value: what the key holds.
        problem: what is wrong with it, with the value that it conflicts with.
        fix: what to do about it.

    >>> print(ConfigError("train.seed", "x", "is no whole number", "use one"))
    train.seed=x: is no whole number; use one
    """

    def __init__(self, key: str, value: Any, problem: str, fix: str):
        super().__init__(" ".join(f"{key}={value}: {problem}; {fix}".split()))
        self.key, self.value, self.problem, self.fix = key, value, problem, fix

    @property
    def errors(self) -> List["ConfigError"]:
        """This one; of :class:`ConfigErrors` each of them."""
        return [self]

    def below(self, key: str) -> "ConfigError":
        """The same error of a part of the config: its key is one of those below ``key``."""
        return ConfigError(f"{key}.{self.key}", self.value, self.problem, self.fix)

    def __reduce__(self) -> Tuple[type, Tuple[Any, ...]]:
        return type(self), (self.key, self.value, self.problem, self.fix)


class ConfigErrors(ConfigError):
    """Several ``errors`` at once.

    As text, each is a line of its own after the first, which the tools introduce.
    """

    def __init__(self, errors: Iterable[ConfigError]):
        self._errors = list(errors)
        Exception.__init__(self, "\nerror: ".join(map(str, self._errors)))

    @property
    def errors(self) -> List[ConfigError]:
        return self._errors

    def __reduce__(self) -> Tuple[type, Tuple[Any, ...]]:
        return type(self), (self._errors,)


#: What a step of :class:`Findings` returns instead of its result when there is none.
FAILED = type("Failed", (), {"__repr__": lambda self: "FAILED", "__bool__": lambda self: False})()


class Findings:
    """Runs independent checks and keeps what all of them find, so that one run reports every mistake.

    A check is a function that raises a ConfigError.  What needs the result of another takes it as an
    argument, and is left out if that one failed::

        findings = Findings()
        student = findings.step(construct, cfg.model.student, "model.student")
        teacher = findings.step(construct, cfg.model.teacher, "model.teacher")
        findings.step(compare, student, teacher)      # only if both are there
        findings.raise_errors()

    Attributes:
        errors: what failed, in the order it was found, each once.
        warnings: what works, but is probably not meant; in the same form.
        facts: what checks learn on their way and the overview shows.
    """

    def __init__(self) -> None:
        self.errors: List[ConfigError] = []
        self.warnings: List[ConfigError] = []
        self.facts: Dict[str, Any] = {}

    def step(self, function: Callable, *args: Any, **options: Any) -> Any:
        """The result of ``function(*args, **options)``, if there is one.

        :data:`FAILED` if it raises a ConfigError, or if one of ``args`` or ``options`` is FAILED.
        """
        if any(x is FAILED for x in (*args, *options.values())):
            return FAILED
        try:
            return function(*args, **options)
        except ConfigError as e:
            self.add(e)
            return FAILED

    def add(self, error: ConfigError) -> None:
        """Note ``error``, or the errors that it consists of, but nothing twice."""
        known = {str(e) for e in self.errors}
        self.errors += [e for e in error.errors if str(e) not in known]

    def warn(self, key: str, value: Any, problem: str, fix: str) -> None:
        """Note what does not stop a run.

        Args:
            key, value, problem, fix: see :class:`ConfigError`.
        """
        self.warnings.append(ConfigError(key, value, problem, fix))

    def raise_errors(self) -> None:
        """Raises:
        ConfigError: the one error there is, or all of them; nothing if there is none.
        """
        if self.errors:
            raise self.errors[0] if len(self.errors) == 1 else ConfigErrors(self.errors)


def collecting(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Let ``function``, which puts what it finds into its ``findings``, raise it without them."""

    @wraps(function)
    def wrapper(*args: Any, findings: Optional[Findings] = None, **options: Any) -> _Result:
        if findings is not None:
            return function(*args, findings=findings, **options)
        findings = Findings()
        result = function(*args, findings=findings, **options)
        findings.raise_errors()
        return result

    return wrapper


class DataError(ConfigError):
    """Data that fail during a run: an image that cannot be read, a loading process that died.

    Args:
        key, value, problem, fix: see :class:`ConfigError`.
    """


class NonFiniteLossError(FloatingPointError):
    """A loss term became infinite or NaN: training stops before the weights are touched."""
