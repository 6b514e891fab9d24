"""LoRA adapters at a replica: from what the gateway asks for to a checked folder.

Refused with a reason: the model's own name, paths that leave the root (``..``, links), pickle weights, another base
model, a rank above the engine's, parts that the engine cannot apply.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rayswift import hub, private
from rayswift.errors import UserError
from rayswift.modeling.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter, read_adapter_config
from rayswift.modeling.adapter_kinds import only_merged
from rayswift.modeling.loading import read_safetensors_header, weight_files
from rayswift.serve.openai_errors import ApiError

if TYPE_CHECKING:
    from rayswift.data.tokens.encoder import Encoder
    from rayswift.generate.model_spec import ModelSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


class AdapterRefused(ApiError):
    """An adapter cannot be used."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message, code="adapter_refused")


def check_name(name: str) -> str:
    """``name`` if it may name an adapter. Raises AdapterRefused (400) for ``..``, absolute paths and the like."""
    if not isinstance(name, str) or len(name) > 200 or not _NAME.fullmatch(name):
        raise AdapterRefused(400, f"adapter {str(name)[:80]!r}: a name has letters, digits, '.', '_', '-' and '/'")
    return name


class AdapterKey(NamedTuple):
    """What a gateway asks a replica for. As text it is Serve's multiplexed model id.

    ``path`` is below ``--adapter_root``, or empty for an adapter given at start. Of two keys of a name the one with the
    greater ``version`` is what the name means now.
    """

    name: str
    path: str = ""
    version: int = 0

    def __str__(self) -> str:
        return f"{self.name}={self.path}#{self.version}"

    @classmethod
    def parse(cls, text: str) -> AdapterKey:
        """The key that reads so."""
        place, _, version = text.rpartition("#")
        name, _, path = place.partition("=")
        return cls(name, path, int(version))


class AdapterLoader:
    """A replica's side: from a key to a checked folder."""

    def __init__(self, plan: ModelSpec) -> None:
        self._plan = plan
        self._base_shapes: dict[str, list[int]] = {}

    def read_base(self, model_dir: str) -> None:
        """Read the shapes of the base model's weights, for comparison."""
        if self._plan.takes_adapters:
            for path in weight_files(model_dir):
                self._base_shapes |= {name: entry["shape"] for name, entry in read_safetensors_header(path).items()}

    def load(self, key: AdapterKey, own: Encoder) -> tuple[str, Encoder]:
        """The folder of an adapter, and how its prompts are laid out; ``own``: the model's. Raises AdapterRefused."""
        folder = self.fetch(key)
        self.check(key.name, folder)
        try:
            return folder, self._plan.adapter_encoder(folder, own)
        except UserError as error:
            raise AdapterRefused(422, f"adapter {key.name}: {error}") from None

    def fetch(self, key: AdapterKey) -> str:
        """The local folder of an adapter; downloads it from a bucket. Raises AdapterRefused."""
        name, path, _ = key
        if name == self._plan.name:
            raise AdapterRefused(400, f"adapter {name}: the model itself is served under that name")
        if not path and name in self._plan.adapters:
            return self._plan.adapters[name]
        root = self._plan.adapter_root
        if root is None:
            raise AdapterRefused(404, f"adapter {name}: unknown")
        if hub.is_remote_uri(root):
            try:
                return hub.resolve_adapter(f"{root.rstrip('/')}/{check_name(path)}")
            except UserError as error:
                raise AdapterRefused(404, f"adapter {name}: {error}") from None
        folder = Path(root, check_name(path))
        for part in (folder, folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS):
            if part.exists() and not part.resolve().is_relative_to(Path(root).resolve()):
                raise AdapterRefused(403, f"adapter {name}: leads out of the server's --adapter_root")
        return str(folder)

    def check(self, name: str, folder: str) -> None:
        """Raises AdapterRefused (422) unless the engine can use the adapter with this base model."""
        try:
            check_adapter(folder)
            shapes = read_safetensors_header(Path(folder) / ADAPTER_WEIGHTS)
        except UserError as error:
            raise AdapterRefused(422, f"adapter {name}: {str(error).partition(': ')[2] or error}") from None
        for problem in self._problems(read_adapter_config(folder), shapes):
            raise AdapterRefused(422, f"adapter {name}: {problem}")

    def _problems(self, config: dict[str, Any], shapes: dict[str, dict[str, Any]]) -> Iterator[str]:
        if reason := only_merged(config, shapes):
            yield reason
        yield from _contradictions(config, shapes)
        ranks = [entry["shape"][0] for key, entry in shapes.items() if ".lora_A" in key]
        if ranks and max(ranks) > self._plan.max_lora_rank:
            yield f"rank {max(ranks)} is above the server's {self._plan.max_lora_rank} (--vllm_max_lora_rank)"
        for key, entry in shapes.items():
            base = self._base_shapes.get(_base_name(key))
            if base is None and _base_name(key) == "lm_head.weight":
                yield "has the output head, which shares the embeddings' weights; merge it with rayswift export"
                return
            side = 1 if ".lora_A" in key else 0
            if base is None or len(base) != 2 or entry["shape"][side] != base[side]:
                yield f"was trained on another base model ({key.removeprefix('base_model.model.')} does not fit)"
                return


def _contradictions(config: dict[str, Any], shapes: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Where configuration and weights do not belong together: an engine would scale or apply them wrongly."""
    rank, patterns, wanted = config.get("r"), config.get("rank_pattern") or {}, config.get("target_modules")
    if type(rank) is not int or rank < 1:
        yield f"its {ADAPTER_CONFIG}: r is {str(rank)[:20]!r}, expected a whole number above 0"
        return
    if not isinstance(patterns, dict) or not all(type(value) is int for value in patterns.values()):
        yield f"its {ADAPTER_CONFIG}: rank_pattern gives patterns whole numbers"
        return
    if not (wanted is None or _is_pattern(wanted) or (isinstance(wanted, list) and all(map(_is_pattern, wanted)))):
        yield f"its {ADAPTER_CONFIG}: target_modules is a list of names or one pattern"
        return
    targets = None if wanted in (None, "all-linear") else private.lora_targets(wanted)
    for key, entry in shapes.items():
        module = _base_name(key).removesuffix(".weight")
        said = patterns.get(private.lora_pattern(list(patterns), module), rank)
        if ".lora_A" in key and entry["shape"][0] != said:
            yield f"its {ADAPTER_CONFIG} says rank {said}, its weights have {entry['shape'][0]}"
        if targets is not None and not targets(module):
            yield f"its {ADAPTER_CONFIG} does not name {module} in target_modules, its weights have it"


def _is_pattern(value: Any) -> bool:
    """Whether a value is text that is a regular expression (a plain name is one)."""
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _base_name(key: str) -> str:
    """The weight that an adapter's tensor changes."""
    return re.sub(r"\.lora_[AB](\.[^.]+)?\.weight$", ".weight", key.removeprefix("base_model.model."))
