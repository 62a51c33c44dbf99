"""The notebook's ``OfflineMNISTClassifier`` for many customers: a class to map over a dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatshare.batch.core import OfflineCore, Rows
from flatshare.errors import BadInput
from flatshare.settings import Settings, load_settings

__all__ = ["OfflineClassifier"]


class OfflineClassifier:
    """Labels batches with one model, or with the model that a column names.

    ``ds.map_batches(OfflineClassifier, fn_constructor_kwargs={"model": "acme"}, batch_format="numpy")``

    Parameters
    ----------
    model
        Of all rows: ``acme``, ``acme:canary`` or ``acme@7``.
    model_column
        Or the column that names each row's model. Sort by it first, and each is loaded about once.
    ready
        Whether whole numbers of 0 to 255 that are not unsigned bytes are model-ready, and not raw pixels.
    settings
        As for a replica of the pool; by default those of this process's environment.
    """

    def __init__(
        self,
        model: str = "",
        *,
        model_column: str = "",
        ready: bool = False,
        settings: Settings | None = None,
    ) -> None:
        if bool(model) == bool(model_column):
            raise BadInput("give a model, or the column that names one")
        self._model = model
        self._model_column = model_column
        self._core = OfflineCore(settings or load_settings(), ready=ready)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The batch with its labels; see :meth:`predict`."""
        return self.predict(batch)

    def predict(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Label a batch.

        Parameters
        ----------
        batch
            ``image``: what the model takes, ``(N, 1, 28, 28)`` for MNIST, or raw pixels ``(N, 28, 28)``
            uint8.

        Returns
        -------
        dict
            The batch and ``predicted_label`` int64, ``model`` (``acme@7``) and ``digest``, all ``(N,)``.

        Raises
        ------
        BadInput, NotFound, Unavailable, Corrupt, ModelFailed
            As the service would refuse it.
        """
        images = batch["image"]
        if images.dtype == object:  # images of Ray Data that it did not know to be alike
            images = np.stack(list(images))
        count = len(images)
        labels = np.empty(count, np.int64)
        names = np.empty(count, object)
        digests = np.empty(count, object)
        for model, at in self._groups(batch, count):
            rows: Rows = images[at]
            labels[at], record = self._core.predict(model, rows)
            names[at], digests[at] = record.name, record.digest
        return {**batch, "predicted_label": labels, "model": names, "digest": digests}

    def _groups(self, batch: dict[str, NDArray[Any]], count: int) -> list[tuple[str, NDArray[np.int64]]]:
        if self._model:
            return [(self._model, np.arange(count))]
        models = batch[self._model_column]
        return [(str(model), np.flatnonzero(models == model)) for model in np.unique(models)]
