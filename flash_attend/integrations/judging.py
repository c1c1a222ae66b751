"""Which Attends `patch` may serve, and how: by what they hold, and by a comparison with ours."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from flash_attend.attend import Attend
from flash_attend.integrations.comparison import Different, compare
from flash_attend.integrations.known import KNOWN, KnownAttend, path_of
from flash_attend.integrations.lucidrains import BroadcastMaskAttend
from flash_attend.integrations.search import MODULE_STATE, Found
from flash_attend.integrations.served import ServedAttend, Service, Serving, dropout_in_force, is_neutral, serving_of

__all__ = ["Judge", "Judgement", "flash_name"]

_FLASH_NAMES = ("flash", "use_flash", "use_flash_attn")
_FORM_OPTIONS = frozenset({"dropout", "causal", "heads", "scale", *_FLASH_NAMES})
_FORM_ARGUMENTS = ("mask", "attn_bias", "bias")
# What lucidrains' classes hold beside their options: the layer, a causal mask that they keep, PyTorch's kernels that
# they allow, a function that they call.
_KERNELS = frozenset({"cpu_config", "cuda_config", "config", "attn_cfg", "sdp_kwargs", "sdp_context_manager"})
_USUAL = frozenset({"attn_dropout", "mask", "create_causal_mask"}) | _KERNELS
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
            _refuse_subclass(kind)
        elif reason := row.refuse(found):
            raise _Refused(reason)
        arguments, surplus = _arguments(attend, kind, row)
        _refuse_changes(attend, kind)
        unset = _unset_options(attend, kind, row)
        _refuse_methods(found)
        name = flash_name(attend, row)
        flash = bool(getattr(attend, name, False))
        scale = getattr(attend, "scale", None)
        self._refuse_values(attend, name, flash, scale)

        ignored = row.flash_scale if row and flash and scale is not None else ""
        changes: list[dict[str, Any]] = [{"scale": None} if ignored else {}]
        changes += [{name: False}] if flash else []
        reading = row.reading if row else ServedAttend
        serving = Serving(kind, reading, name, (*services, self.service), arguments, surplus, unset)
        reading, alignment = self._compare(attend, serving, changes, row)
        doubts = [alignment] if alignment else []
        doubts += [f"scale = {scale} applies from now on: its flash path {ignored}"] if ignored else []
        differs = row.flash_differs if row and flash else ()
        if "dropout" in differs and dropout_in_force(attend, name)[0]:
            doubts.append(f"dropout = {attend.dropout} applies from now on: its flash path drops nothing")
        doubts += [doubt] if row and (doubt := row.doubt(found)) else []
        notes = [] if row else ["not in the table of known classes; computes the same on examples"]
        notes += ["what a call says of causal holds: its flash path ignores it"] if "causal" in differs else []
        return Judgement("replaced", serving._replace(reading=reading), "; ".join(notes + doubts), bool(doubts))

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
        held = {name: repr(value) for name, value in vars(attend).items() if name not in {*MODULE_STATE, "dropout"}}
        alike = (serving.kind, frozenset(held.items()), frozenset(attend._modules))
        if alike not in self.verdicts:
            masked = "mask" in serving.arguments
            readings = [serving.reading] if row or not masked else [ServedAttend, BroadcastMaskAttend]
            differs = row.flash_differs if row else ()
            self.verdicts[alike] = _first_that_agrees(attend, serving, readings, changes, differs)
        verdict = self.verdicts[alike]
        if isinstance(verdict, Different):
            raise _Refused(str(verdict) if row else f"not in the table of known classes, and {verdict}")
        return verdict


def _first_that_agrees(
    attend: nn.Module,
    serving: Serving,
    readings: list[type[ServedAttend]],
    changes: list[dict[str, Any]],
    flash_differs: Collection[str],
) -> tuple[type[ServedAttend], str] | Different:
    """A reading of the arguments by which ours computes the same, and a note; or what is wrong with the first one."""
    differences = []
    for reading in readings:
        try:
            return reading, compare(attend, serving._replace(reading=reading), changes, flash_differs)
        except Different as difference:
            differences.append(difference)
    return differences[0]


def flash_name(attend: nn.Module, row: KnownAttend | None) -> str:
    """The attribute that chooses a flash path."""
    return row.flash if row else next((name for name in _FLASH_NAMES if name in vars(attend)), "flash")


def _refuse_subclass(kind: type[nn.Module]) -> None:
    """For a class without a row: whether it is one of the known ones, changed."""
    for base in kind.__mro__[1:]:
        if path_of(base) in KNOWN:
            raise _Refused(
                f"it is a subclass of {path_of(base)} and may compute something else; register() it if it does not"
            )


def _arguments(
    attend: nn.Module, kind: type[nn.Module], row: KnownAttend | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What its forward takes after q, k and v, and what of that is not served."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    names = tuple(parameter.name for parameter in parameters)
    known = row.arguments if row else _FORM_ARGUMENTS
    served = (row.reading if row else ServedAttend)._served_arguments(attend, [name for name in known if name in names])
    surplus = tuple(parameter for parameter in parameters[3:] if parameter.name not in served)
    missing = [name for name in row.arguments if name not in names] if row else []
    if names[:3] != ("q", "k", "v") or missing or not all(is_neutral(parameter.default) for parameter in surplus):
        which = "" if row else "not in the table of known classes, and "
        takes = f"{which}its forward takes ({', '.join(names)})"
        raise _Refused(f"{takes}; supported is ({', '.join(('q', 'k', 'v', *known))}), and others at None or False")
    return names[3:], tuple(parameter.name for parameter in surplus)


def _unset_options(attend: nn.Module, kind: type[nn.Module], row: KnownAttend | None) -> tuple[str, ...]:
    """What this instance holds that its row does not account for, all of it None or False."""
    accounted = frozenset({*row.options, row.flash}) if row else _FORM_OPTIONS
    known = accounted | MODULE_STATE | _USUAL | _MARKS | frozenset(row.attributes if row else ())
    held = [*vars(attend), *attend._parameters, *attend._buffers, *attend._modules]
    unknown = [name for name in held if name not in known]
    options = inspect.signature(kind.__init__).parameters
    surplus = [name for name in unknown if not is_neutral(getattr(attend, name))]
    if asked := [f"{name}={getattr(attend, name)!r}" for name in surplus if name in options]:
        raise _Refused(f"option {', '.join(asked)} is not supported; these are: {', '.join(sorted(accounted))}")
    if surplus:
        raise _Refused(f"it holds {', '.join(surplus)}, of which flash_attend does not know the meaning")
    return tuple(unknown)


def _refuse_changes(attend: nn.Module, kind: type[nn.Module]) -> None:
    """Whether this instance is more than its class and its options."""
    if kind.forward.__module__ != kind.__module__:
        raise _Refused(f"its forward was replaced by one from {kind.forward.__module__}")
    if overridden := [name for name in vars(attend) if inspect.isfunction(getattr(kind, name, None))]:
        raise _Refused(f"its {', '.join(overridden)} was replaced on this instance")
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
