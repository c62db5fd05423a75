"""Every rule that can be broken, by id: the one table that errors, the specification and the vectors share.

LF-1xx container, LF-2xx metadata, LF-3xx targets and parts, LF-4xx placement and special parts: *file rules*, each
stated in ``spec/loraformat.md`` and broken by a vector. LF-5xx layouts, LF-6xx bases, LF-7xx files and runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraformat.errors import Severity

__all__ = ["RULES", "Rule"]


@dataclass(frozen=True, slots=True)
class Rule:
    """An id and what must hold."""

    id: str
    title: str
    severity: Severity = "error"

    @property
    def of_file(self) -> bool:
        """Whether a file alone can break it: such a rule is in the specification and has a vector."""
        return self.id[3] in "1234"


_ALL = (
    Rule("LF-101", "a file begins with an 8-byte header length"),
    Rule("LF-102", "the header lies within the file and within 100,000,000 bytes"),
    Rule("LF-103", "the header is a UTF-8 JSON object"),
    Rule("LF-104", "no JSON object of the header has a key twice"),
    Rule("LF-105", "a header entry has exactly dtype, shape and data_offsets, of the right types"),
    Rule("LF-106", "every dtype is known"),
    Rule("LF-107", "tensors cover the data section without overlap, hole or rest"),
    Rule("LF-108", "data_offsets hold as many bytes as dtype and shape need"),
    Rule("LF-109", "__metadata__ maps strings to strings"),
    Rule("LF-201", "__metadata__ has the key loraformat"),
    Rule("LF-202", "the loraformat value is an I-JSON object"),
    Rule("LF-203", "required fields are present and every field has its type"),
    Rule("LF-204", "fields are those of this version", "warning"),
    Rule("LF-205", "version is one that the reader knows"),
    Rule("LF-206", "every feature in requires is known to the reader"),
    Rule("LF-207", "the loraformat value is canonical JSON", "warning"),
    Rule("LF-208", "names is a known name space or a reverse-DNS name"),
    Rule("LF-209", "with components, every key begins with one of them and a colon"),
    Rule("LF-301", "a key is non-empty NFC text without control characters"),
    Rule("LF-302", "every tensor is <key>.<role> of a part of a listed target"),
    Rule("LF-303", "every part has the tensors that its kind needs"),
    Rule("LF-304", "a file has at least one target"),
    Rule("LF-305", "parts are of known kinds, each once, in order of application"),
    Rule("LF-306", "alpha is a number, finite in single precision"),
    Rule("LF-307", "scale_rule is known, and a rule with r has an r of at least 1"),
    Rule("LF-308", "a stated r equals the rank of the tensors"),
    Rule("LF-309", "the tensors of a target fit each other"),
    Rule("LF-311", "no tensor is empty"),
    Rule("LF-312", "every value is finite in single precision"),
    Rule("LF-313", "some value of every factor is not zero", "warning"),
    Rule("LF-314", "a tensor's dtype is allowed for its role"),
    Rule("LF-401", "shape and axes are both present or both absent"),
    Rule("LF-402", "axes name every axis of shape exactly once"),
    Rule("LF-403", "the factors give the matrix that the placement describes"),
    Rule("LF-404", "magnitude fits its axes, which a placement must explain"),
    Rule("LF-405", "row indices are unique, ascending and within the axis, and values fit them"),
    Rule("LF-406", "replace has the shape of the placement"),
    Rule("LF-407", "base_sha256 is 64 lower-case hexadecimal digits"),
    Rule("LF-408", "a sketch is 64 float32 values"),
    Rule("LF-501", "the layout of the input can be told"),
    Rule("LF-502", "only one layout claims the input"),
    Rule("LF-503", "the configuration beside the tensors can be read"),
    Rule("LF-504", "the source holds nothing that has no exact form here"),
    Rule("LF-505", "every configuration key is known", "warning"),
    Rule("LF-506", "every tensor of the source is understood"),
    Rule("LF-507", "two statements of one fact agree"),
    Rule("LF-508", "the target layout can carry the adapter"),
    Rule("LF-509", "the scale is stated"),
    Rule("LF-510", "a PyTorch file holds tensors in plain containers, and nothing that would have to run"),
    Rule("LF-511", "a GGUF file has no length, offset or name that its bytes do not bear out"),
    Rule("LF-601", "the kind of base can be told"),
    Rule("LF-602", "every target is found in the base"),
    Rule("LF-603", "no target has two candidates, and no place two targets"),
    Rule("LF-604", "the placement of every target is known by evidence"),
    Rule("LF-605", "two pieces of evidence for a placement agree"),
    Rule("LF-606", "the update fits the base tensor's shape"),
    Rule("LF-607", "the base is the one that the adapter was bound to"),
    Rule("LF-608", "the base's operator can carry the update"),
    Rule("LF-609", "a tensor shared by several modules is changed only where it is meant"),
    Rule("LF-610", "the base file is sound"),
    Rule("LF-611", "the result equals base and adapter"),
    Rule("LF-612", "what is asked of an update is defined for it"),
    Rule("LF-613", "what is attached to a model is as it was attached"),
    Rule("LF-614", "a recipe finds the inputs that it names, and gives the result that it names"),
    Rule("LF-615", "enough of the change survives the base's dtype"),
    Rule("LF-616", "the base tensor has the scale of the one that the adapter was bound to"),
    Rule("LF-701", "the input can be read"),
    Rule("LF-702", "nothing is overwritten without --force"),
    Rule("LF-703", "the output can be written"),
    Rule("LF-704", "what a command needs is installed"),
    Rule("LF-705", "a command's arguments are possible"),
    Rule("LF-710", "the input is within the stated size"),
    Rule("LF-711", "every rank is within the stated limit"),
    Rule("LF-712", "the number of targets is within the stated limit"),
    Rule("LF-713", "reading fails for no other reason than those that have a rule"),
)

RULES = {rule.id: rule for rule in _ALL}
"""Rule id → rule."""
