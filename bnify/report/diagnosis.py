"""What ``bnify doctor`` found, for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bnify.report.document import Block, Column, Document, Facts, Mark, Table, Verdict
from bnify.report.numbers import count


def doctor_document(found: Mapping[str, Any]) -> Document:
    """Versions, packages, where things compute, and what is missing with the line that cures it."""
    blocks: list[Block] = [
        Facts("Versions", tuple((k, str(found[k])) for k in ("bnify", "python", "platform"))),
        _packages(found["packages"]),
        _devices(found["providers"], found["cuda"]),
    ]
    missing = found["missing"]
    if missing:
        rows = tuple((item["name"], item["why"], item["hint"]) for item in missing)
        columns = (Column("What", short=True), Column("Why"), Column("Try"))
        blocks.append(Table("Missing", columns, rows))
    blocks.append(_verdict(found["ok"], missing))
    return Document("bnify doctor", tuple(blocks))


def _packages(packages: Mapping[str, Mapping[str, Any]]) -> Table:
    return Table(
        "Packages",
        (Column("Package", short=True), Column("Version"), Column("Needs"), Column("Result")),
        tuple(
            (
                name,
                package["version"] or "not installed",
                package["needs"] or "any",
                "pass" if package["ok"] else "FAIL" if package["required"] else "optional",
            )
            for name, package in packages.items()
        ),
    )


def _devices(providers: list[str], cuda: Mapping[str, Any]) -> Facts:
    pairs = [("onnxruntime", ", ".join(providers) or "not there")]
    names = ("torch", "onnxruntime")
    pairs += [(f"CUDA in {name}", "yes" if cuda.get(name) else "no") for name in names]
    if cuda.get("why"):
        pairs.append(("why", str(cuda["why"])))
    if cuda.get("devices"):
        pairs.append(("devices", ", ".join(cuda["devices"])))
    if cuda.get("precision"):
        pairs.append(("float32 on CUDA", str(cuda["precision"])))
    return Facts("Where it computes", tuple(pairs))


def _verdict(ok: bool, missing: list[Any]) -> Verdict:
    optional = count(sum(not item["required"] for item in missing), "optional thing")
    if not ok:
        needed = sum(bool(item["required"]) for item in missing)
        return Verdict(Mark.FAIL, f"{needed} missing that bnify needs, see above")
    rest = f"; {optional} missing" if missing else ""
    return Verdict(Mark.PASS, f"everything that bnify needs is there{rest}")
