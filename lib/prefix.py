"""What the prompts of a batch begin with in common: read once, and kept for the next batch."""

import copy


class SharedPrefix:
    """The prefix that a model has read last, as a decoder of one row and as the cache of many."""

    def __init__(self, model, decoder_class: type):
        """decoder_class is sample.Decoder."""
        self.model = model
        self.decoder_class = decoder_class
        self.ids: list[int] = []
        self.decoder = None  # of one row
        self.wide = None     # of many rows, each of which began with the prefix

    def read(self, ids: list[int]):
        """A decoder of one row that has read ids; None where there are none."""
        if ids != self.ids:
            self.ids, self.decoder, self.wide = [], None, None
            if ids:
                self.decoder = self.decoder_class(self.model, 1, len(ids))
                self.decoder.read([ids])
            self.ids = ids
        return self.decoder

    def cache(self, ids: list[int], rows: int, slots: int):
        """A model.KVCache in which each of so many rows holds ids; None where there are none.

        It has room for at least slots tokens in a row. Its memory is that of the last one where
        that suffices.
        """
        if self.read(ids) is None:
            return None
        if not self._suffices(rows, slots):
            spare = rows // 4  # later batches have more rows
            self.wide = self.decoder_class(self.model, rows + spare, slots, self.decoder)
        cache = copy.copy(self.wide.cache)
        cache.keys = cache.keys[:, :rows]
        cache.values = cache.values[:, :rows]
        cache.lengths = cache.lengths[:rows]
        cache.trim([len(self.ids)] * rows)
        return cache

    def _suffices(self, rows: int, slots: int) -> bool:
        if self.wide is None:
            return False
        _, most_rows, _, most_slots, _ = self.wide.cache.keys.shape  # (layers, B, G, S, K)
        return most_rows >= rows and most_slots >= slots
