"""Which Attends `patch` may serve, and how: by what they hold, and by a comparison with ours."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from flash_attend.attend import Attend
from flash_attend.integrations.comparison import Different, compare
from flash_attend.integrations.lucidrains import KNOWN, BroadcastMaskAttend, KnownAttend, path_of
from flash_attend.integrations.search import MODULE_STATE, Found
from flash_attend.integrations.served import ServedAttend, Service, Serving, dropout_in_force, serving_of

__all__ = ["Judge", "Judgement", "flash_name"]

_FLASH_NAMES = ("flash", "use_flash", "use_flash_attn")
_FORM_OPTIONS = frozenset({"dropout", "causal", "heads", "scale", *_FLASH_NAMES})
# What lucidrains' classes hold beside their options: the layer, a causal mask that they keep, PyTorch's kernels that
# they allow, a function that they call.
_USUAL = frozenset({"attn_dropout", "mask", "cpu_config", "cuda_config", "create_causal_mask"})
_MARKS = frozenset({"_is_hf_initialized", "_is_torch_compile"})  # that transformers and torch.compile leave on modules


@dataclass(frozen=True)
class Judgement:
    """How to serve an Attend (None: not at all, or not otherwise than it is already), and a note or the reason."""

    status: str
    serving: Serving | None = None
    reason: str = ""
    doubtful: bool = False  # the note is about calls that the model may well make: worth a warning


class _Refused(Exception):
    """The reason to leave an Attend as it is."""


class Judge:
    """Decides about every Attend of a model. Those that are alike are compared with ours once."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.verdicts: dict[Any, tuple[type[ServedAttend], str] | Different] = {}

    @staticmethod
    def original(attend: nn.Module) -> type[nn.Module]:
        """The class that an Attend had before it was served."""
        serving: Serving | None = getattr(type(attend), "_flash_attend", None)
        return serving.kind if serving else type(attend)

    def judge(self, found: Found) -> Judgement:
        """What becomes of one Attend."""
        attend = found.attend
        # Both are told by name, which stays when the package is loaded again.
        if any(path_of(base) == path_of(Attend) for base in type(attend).__mro__):
            return Judgement("ours already")
        serving: Serving | None = getattr(type(attend), "_flash_attend", None)
        if serving and serving.services[-1].asks_the_same(self.service):
            return Judgement("ours already")
        try:
            if serving and not serving_of(attend):
                raise _Refused(f"its class became {path_of(type(attend))} after it was patched")
            return self._judge(found, self.original(attend), serving.services if serving else ())
        except _Refused as refusal:
            return Judgement("refused", reason=str(refusal))
        except Exception as error:  # whatever a class does where its attributes are read
            return Judgement("refused", reason=f"it cannot be examined: {type(error).__name__}: {error}")

    def _judge(self, found: Found, kind: type[nn.Module], services: tuple[Service, ...]) -> Judgement:
        attend, row = found.attend, KNOWN.get(path_of(kind))
        if row is None:
            _refuse_form(kind)
        elif reason := row.refuse(attend):
            raise _Refused(reason)
        _refuse_options(attend, kind, row)
        _refuse_changes(attend, kind, row)
        _refuse_methods(found)
        name = flash_name(attend, row)
        flash = bool(getattr(attend, name, False))
        scale = getattr(attend, "scale", None)
        self._refuse_values(attend, name, flash, scale)

        ignored = row.flash_scale if row and flash and scale is not None else ""
        changes: list[dict[str, Any]] = [{"scale": None} if ignored else {}]
        changes += [{name: False}] if flash else []
        serving = Serving(kind, row.reading if row else ServedAttend, name, (*services, self.service))
        reading, note = self._compare(attend, serving, changes, row)
        notes = [] if row else ["not in the table of known classes; computes the same on examples"]
        notes += [note] if note else []
        notes += [f"scale = {scale} applies from now on: its flash path {ignored}"] if ignored else []
        return Judgement("replaced", serving._replace(reading=reading), "; ".join(notes), bool(ignored))

    def _refuse_values(self, attend: nn.Module, name: str, flash: bool, scale: Any) -> None:
        """Whether ours takes the values that its options have."""
        try:
            Attend(
                dropout_in_force(attend, name)[0],
                getattr(attend, "causal", False),
                scale=scale,
                flash=flash if self.service.keep_flash else None,
                backend=self.service.backend,
                deterministic=self.service.deterministic,
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise _Refused(str(error)) from error

    def _compare(
        self, attend: nn.Module, serving: Serving, changes: list[dict[str, Any]], row: KnownAttend | None
    ) -> tuple[type[ServedAttend], str]:
        """How it reads its arguments, and a note."""
        masked = "mask" in inspect.signature(serving.kind.forward).parameters
        held = {name: repr(value) for name, value in vars(attend).items() if name not in {*MODULE_STATE, "dropout"}}
        alike = (serving.kind, frozenset(held.items()), frozenset(attend._modules))
        if alike not in self.verdicts:
            readings = [serving.reading] if row or not masked else [ServedAttend, BroadcastMaskAttend]
            self.verdicts[alike] = _first_that_agrees(attend, serving, readings, changes, masked)
        verdict = self.verdicts[alike]
        if isinstance(verdict, Different):
            raise _Refused(str(verdict) if row else f"not in the table of known classes, and {verdict}")
        return verdict


def _first_that_agrees(
    attend: nn.Module,
    serving: Serving,
    readings: list[type[ServedAttend]],
    changes: list[dict[str, Any]],
    masked: bool,
) -> tuple[type[ServedAttend], str] | Different:
    """A reading of the arguments by which ours computes the same, and a note; or what is wrong with the first one."""
    differences = []
    for reading in readings:
        try:
            return reading, compare(attend, serving._replace(reading=reading), changes, masked)
        except Different as difference:
            differences.append(difference)
    return differences[0]


def flash_name(attend: nn.Module, row: KnownAttend | None) -> str:
    """The attribute that chooses a flash path."""
    return row.flash if row else next((name for name in _FLASH_NAMES if name in vars(attend)), "flash")


def _refuse_form(kind: type[nn.Module]) -> None:
    """For a class without a row: whether it has the form of the known ones."""
    for base in kind.__mro__[1:]:
        if path_of(base) in KNOWN:
            raise _Refused(
                f"it is a subclass of {path_of(base)} and may compute something else; register() it if it does not"
            )
    parameters = tuple(inspect.signature(kind.forward).parameters)[1:]
    if parameters not in (("q", "k", "v"), ("q", "k", "v", "mask")):
        raise _Refused(f"not in the table of known classes, and its forward takes ({', '.join(parameters)})")


def _refuse_options(attend: nn.Module, kind: type[nn.Module], row: KnownAttend | None) -> None:
    """Whether the constructor or forward of the installed version takes what the row does not account for."""
    accounted = frozenset(row.options) if row else _FORM_OPTIONS
    surplus = [name for name in list(inspect.signature(kind.__init__).parameters)[1:] if name not in accounted]
    if surplus:
        values = [f"{name}={getattr(attend, name)!r}" if hasattr(attend, name) else name for name in surplus]
        raise _Refused(f"option {', '.join(values)} is not supported; these are: {', '.join(sorted(accounted))}")
    arguments = tuple(inspect.signature(kind.forward).parameters)[1:]
    if row and arguments[3:] != row.arguments:
        known = ", ".join(["q", "k", "v", *row.arguments])
        raise _Refused(f"its forward takes ({', '.join(arguments)}); supported is ({known})")


def _refuse_changes(attend: nn.Module, kind: type[nn.Module], row: KnownAttend | None) -> None:
    """Whether this instance is more than its class and its options."""
    if kind.forward.__module__ != kind.__module__:
        raise _Refused(f"its forward was replaced by one from {kind.forward.__module__}")
    if overridden := [name for name in vars(attend) if inspect.isfunction(getattr(kind, name, None))]:
        raise _Refused(f"its {', '.join(overridden)} was replaced on this instance")
    known = MODULE_STATE | _USUAL | _MARKS | ({*row.options, row.flash, *row.attributes} if row else _FORM_OPTIONS)
    held = [*vars(attend), *attend._parameters, *attend._buffers, *attend._modules]
    if unknown := [name for name in held if name not in known]:
        raise _Refused(f"it holds {', '.join(unknown)}, of which flash_attend does not know the meaning")
    layer = getattr(attend, "attn_dropout", None)
    if layer is not None and type(layer) is not nn.Dropout:
        raise _Refused(f"its attn_dropout is a {type(layer).__name__}; supported is nn.Dropout")
    hooks = [] if layer is None else [name for name, held in vars(layer).items() if "_hooks" in name and held]
    if hooks:
        raise _Refused(f"its attn_dropout has {', '.join(hooks)}, and is not called by ours")


def _refuse_methods(found: Found) -> None:
    """A bound method runs what it was taken from, whatever becomes of its object's class."""
    for path, name in found.methods.items():
        if name == "forward":
            raise _Refused(f"{path} holds its bound method forward, which stays what it is: hold the module itself")
