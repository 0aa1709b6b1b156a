"""What a run measured, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class EpochRecord:
    """The figures of one epoch.

    Attributes
    ----------
    epoch : int
        Counted from 1.
    loss : float
        Mean training loss over the epoch's images, each taken with the parameters
        that its batch met.
    accuracy : float
        Share of those images classified right at that moment, from 0 to 1. None where
        the model is to give numbers, not classes.
    lr : float
        Learning rate of the epoch's last step.
    seconds : float
        Time the training took, evaluation left out.
    images_per_second : float
    test_loss, test_accuracy : float or None
        None where ``fit`` was given no test set; the accuracy also as above.
    """

    epoch: int
    loss: float
    accuracy: float | None
    lr: float
    seconds: float
    images_per_second: float
    test_loss: float | None = None
    test_accuracy: float | None = None


_NAMES = tuple(field.name for field in fields(EpochRecord))


class History(Sequence):
    """The records of a run, in order.

    ``history[i]`` is a record, ``history["loss"]`` the list of one figure over all
    epochs.
    """

    def __init__(self, records=()):
        self._records = list(records)

    def append(self, record: EpochRecord) -> None:
        self._records.append(record)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, key):
        if isinstance(key, str):
            if key not in _NAMES:
                raise KeyError(f"a history has {', '.join(_NAMES)}; not {key!r}")
            return [getattr(record, key) for record in self._records]
        if isinstance(key, slice):
            return History(self._records[key])
        return self._records[key]

    def __eq__(self, other):
        if not isinstance(other, History):
            return NotImplemented
        return self._records == other._records

    __hash__ = None

    def __repr__(self):
        lines = "".join(f"\n  {record}" for record in self._records)
        return f"History of {len(self)} epochs:{lines}"

    def to_list(self) -> list[dict]:
        """Plain dicts, one an epoch, ready for ``json.dump``."""
        return [asdict(record) for record in self._records]

    @classmethod
    def from_list(cls, rows) -> History:
        """The inverse of :meth:`to_list`."""
        return cls(EpochRecord(**row) for row in rows)
