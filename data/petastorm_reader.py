# SPDX-License-Identifier: Apache-2.0
"""Row groups through petastorm's ``make_batch_reader``: the only file that imports petastorm, and only when used.

Invariant: one petastorm reader reads one row group and is asked for exactly one result, in the caller's thread (its
``dummy`` pool), so that no order is left to a scheduler. Measured and read in petastorm 0.13.1, and met here:

- its thread pool tests its workers before its ventilator and so can lose rows; the order is put right here even though
  this file does not use that pool, because other users in the process may;
- its dummy pool can wait for ever when it is asked once more after the last result, and publishes nothing for an empty
  row group: it is asked once per row group, and never for an empty one;
- its conversion to numpy turns integers with nulls into floats and refuses lists of different lengths, so the Arrow
  table that its worker read is taken before that conversion;
- it leaves out columns of unsigned integers and of large or fixed-size lists, although it reads them well: its type
  map is completed.

A reader belongs to one thread at a time.
"""

import importlib
import re
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import pyarrow as pa

from oarlock.data.splits import SplitPlan


class PetastormTables:
    """The TableSource of ``--reader petastorm``."""

    def table(self, plan: SplitPlan, names: Sequence[str]) -> Any:
        """Return the Arrow table of a split's row groups with the named columns."""
        if set(plan.file.path) & set("#?;"):
            raise RuntimeError("petastorm cuts a path at '#', '?' and ';': rename it or use --reader arrow")
        groups = range(plan.first_group, plan.stop_group)
        tables = [self._row_group(plan, group, names) for group in groups if plan.file.row_groups[group]]
        return pa.concat_tables(tables)

    def _row_group(self, plan: SplitPlan, group: int, names: Sequence[str]) -> Any:
        petastorm = _prepared()
        _silence()
        reader = petastorm.make_batch_reader(
            f"file://{plan.file.path}",
            schema_fields=[re.escape(name) for name in names],
            reader_pool_type="dummy",
            shuffle_row_groups=False,
            num_epochs=1,
            cur_shard=group,
            shard_count=len(plan.file.row_groups),
        )
        try:
            reader._results_queue_reader = _Tables()
            table = next(reader, None)
        finally:
            # Not its context manager: that one prints on stdout when it closes.
            reader.stop()
            reader.join()
        if table is None:
            raise RuntimeError(f"no rows came out of row group {group}")
        missing = sorted(set(names) - set(table.column_names))
        if missing:
            raise RuntimeError(f"petastorm cannot read the type of column {missing[0]!r}; use --reader arrow")
        return table.select(list(names)).replace_schema_metadata(None)


class _Tables:
    """Stands in for petastorm's conversion of a result to numpy: hands the Arrow table on as it is."""

    batched_output = True

    def read_next(self, workers_pool: Any, schema: Any, ngram: Any) -> Any:
        from petastorm.workers_pool import EmptyResultError

        try:
            return workers_pool.get_results()
        except EmptyResultError:
            raise StopIteration from None


def problem() -> str | None:
    """Return None where petastorm can be used, else why not."""
    if int(pa.__version__.split(".")[0]) >= 15:
        return f"petastorm needs pyarrow 14 or older, found {pa.__version__}"
    try:
        _prepared()
    except (ImportError, AttributeError) as error:
        return " ".join(str(error).split())
    return None


@cache
def _prepared() -> Any:
    """Import petastorm once and mend what the header lists."""
    _silence()
    petastorm = importlib.import_module("petastorm")
    importlib.import_module("petastorm.reader")
    _mend_thread_pool(importlib.import_module("petastorm.workers_pool.thread_pool"))
    _mend_type_map(importlib.import_module("petastorm.unischema"))
    return petastorm


def _mend_thread_pool(module: Any) -> None:
    workers_done = module.ThreadPool.all_workers_done

    def all_workers_done(pool: Any) -> bool:
        # Read first: what is put in the queues between the two tests would be dropped.
        completed = pool._ventilator is None or pool._ventilator.completed()
        return bool(completed and workers_done(pool))

    module.ThreadPool.all_workers_done = all_workers_done


def _mend_type_map(module: Any) -> None:
    known = module._numpy_and_codec_from_arrow_type

    def numpy_type(kind: Any) -> Any:
        if pa.types.is_unsigned_integer(kind):
            return kind.to_pandas_dtype()
        if pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            return numpy_type(kind.value_type)
        return known(kind)

    module._numpy_and_codec_from_arrow_type = numpy_type


def _silence() -> None:
    """Ignore the warnings that petastorm's own modules cause; all others stay. Cheap, and repeated because a caller may
    have reset the filters since."""
    for category in (FutureWarning, DeprecationWarning, ResourceWarning):
        warnings.filterwarnings("ignore", category=category, module=r"petastorm(\.|$)")
    for message in (r"Column .* has an unsupported field", r"\[ARROW-1644\] Ignoring unsupported structure"):
        warnings.filterwarnings("ignore", message=message, category=UserWarning, module=r"petastorm(\.|$)")
