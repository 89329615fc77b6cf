"""FairLine: who is answered next, when several visitors wait.

Visitors take turns. A visitor's own requests keep their order, and however many they are, everybody
else is answered once between two of them. It knows nothing of models, and locks nothing.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairLine(Generic[T]):
    """A line of items that belong to visitors; round robin over the visitors."""

    def __init__(self) -> None:
        # The first visitor is next; one who was served and still waits goes to the end.
        self._turns: OrderedDict[Hashable, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        """Items that wait."""
        return sum(map(len, self._turns.values()))

    def __iter__(self) -> Iterator[T]:
        """The items, visitor by visitor; not the order in which they are served."""
        return (item for items in self._turns.values() for item in items)

    def put(self, visitor: Hashable, item: T) -> None:
        """Put an item behind those of the same visitor; a new visitor comes last."""
        self._turns.setdefault(visitor, deque()).append(item)

    def take(self) -> T:
        """The next item, which leaves the line.

        Raises:
            KeyError: nobody waits.
        """
        visitor, items = self._turns.popitem(last=False)
        item = items.popleft()
        if items:
            self._turns[visitor] = items
        return item

    def remove(self, item: T) -> bool:
        """Take an item out of the line; whether it was there."""
        for visitor, items in self._turns.items():
            if item in items:
                items.remove(item)
                if not items:
                    del self._turns[visitor]
                return True
        return False

    def ahead(self, item: T) -> int | None:
        """How many items are served before this one, as the line is now; None: it is not there."""
        earlier = True  # visitors whose turn comes before that of the item's own
        own = next((list(q).index(item) for q in self._turns.values() if item in q), None)
        if own is None:
            return None
        count = own
        for items in self._turns.values():
            if item in items:
                earlier = False
            else:
                count += min(len(items), own + earlier)
        return count

    def clear(self) -> None:
        """Send everybody away."""
        self._turns.clear()
