"""What is known of adapters: before they are merged, and of what was saved."""

from mot_lora.records import Record


class AdapterRecord(Record):
    """One adapter: its base as recorded in it, the number of updates by form, their ranks, |D| and |D| / |W|."""

    name: str
    base: str | None
    parameters: int
    forms: dict[str, int]
    ranks: tuple[int, ...]
    norm: float
    relative_norm: float | None


class LayerRecord(Record):
    """Several adapters in one layer: |D| and |D| / |W| of each, their cosines, and the share of conflicting signs."""

    norms: tuple[float, ...]
    relative_norms: tuple[float, ...] | None
    cosine: tuple[tuple[float, ...], ...]
    sign_conflict: float


class InspectRecord(Record):
    """An inspection of adapters before a merge; `lost` is the share of their mean that a rank-r copy loses."""

    adapters: tuple[AdapterRecord, ...]
    overall: LayerRecord
    layers: dict[str, LayerRecord]
    lost: dict[int, float]


class SaveRecord(Record):
    """A merge saved as an adapter: its ranks, and the share |lost| / |D| that they cost, in total and by module.

    `method` is None for a single adapter; `rank` is the largest of `ranks`. `uniform`: all modules have this rank, so
    that programs that know only one rank and alpha (vLLM, llama.cpp) scale them as PEFT does.
    """

    method: str | None
    rank: int
    ranks: dict[str, int]
    uniform: bool = True
    lost: float
    modules: dict[str, float]
