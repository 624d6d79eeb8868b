"""JSON files of this package: one form, with the number of its layout, and one way to refuse what does not fit it.

A record is an object whose key `schema` numbers the layout. Config, plan, report, widening and comparison each have a
`RecordFormat`, which writes their text and turns whatever goes wrong in reading it into their own error.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from hf_camphive.core.errors import CampHiVeError

_Record = TypeVar("_Record")
_FAULTS = (KeyError, TypeError, ValueError, AttributeError)  # of building a record from values that do not fit it


@dataclass(frozen=True)
class RecordFormat:
    """One kind of JSON file.

    `name` stands for the file in messages that are given no path, `error` is the type of every error in reading it, and
    `remedy` ends the messages about damaged files. Without `schema_required`, a file that has no schema is read as one
    of this layout.
    """

    name: str
    error: type[CampHiVeError]
    schema: int = 1
    indent: int = 1
    remedy: str = "restore it from the run that wrote it"
    schema_required: bool = True

    def write(self, values: Mapping[str, Any]) -> str:
        """Return the file's text.

        Raises:
            ValueError: A number is not finite, which JSON has no word for.
        """
        return json.dumps({"schema": self.schema, **values}, indent=self.indent, allow_nan=False) + "\n"

    def read(self, text: str | bytes, build: Callable[[dict[str, Any]], _Record], where: str = "") -> _Record:
        """Return the record that `build` makes of the file's text; `where` names the file in messages.

        Raises:
            CampHiVeError: The text is no JSON, or `restore` refuses its values; always of type `error`.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise self.error(f"{where or self.name} is not valid JSON ({error}); {self.remedy}") from error
        return self.restore(values, build, where)

    def restore(self, values: Any, build: Callable[[dict[str, Any]], _Record], where: str = "") -> _Record:
        """Return the record that `build` makes of a file's values, which it is given without `schema`.

        Raises:
            CampHiVeError: The values are no object, have another schema, or do not fit; always of type `error`.
        """
        where = where or self.name
        if not isinstance(values, Mapping):
            kind = type(values).__name__
            raise self.error(f"{where} holds a value of type {kind}, not a table of keys and values; {self.remedy}")
        if self.schema_required and "schema" not in values:
            raise self.error(f"{where} has no schema, so that hf_camphive did not write it; {self.remedy}")
        if (schema := values.get("schema", self.schema)) != self.schema:
            raise self.error(
                f"{where} has schema {schema}, not {self.schema}; install the version of hf_camphive that wrote it"
            )
        return self.build({key: value for key, value in values.items() if key != "schema"}, build, where)

    def build(self, values: Any, build: Callable[[Any], _Record], where: str = "") -> _Record:
        """Return the record that `build` makes of values that have no schema of their own.

        Raises:
            CampHiVeError: A key is missing, or a value does not fit; of type `error`, or what `build` itself raises.
        """
        try:
            return build(values)
        except CampHiVeError:
            raise
        except _FAULTS as error:
            fault = f"it lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
            raise self.error(f"{where or self.name} is damaged ({fault}); {self.remedy}") from error
