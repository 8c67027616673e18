"""Findings of `check` for pipelines: annotations of GitHub, SARIF 2.1.0 for code scanning, JUnit test reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.etree import ElementTree

import tierewrite
from tierewrite.errors import escaped
from tierewrite.json_text import dumps
from tierewrite.tables import some

if TYPE_CHECKING:
    from tierewrite.consumers import Finding, ReadinessReport

_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_IN_URIS = "/:@!$&'()*+,;=~"
"""What may stand in the path of a URI as it is (RFC 3986, section 3.3)."""


def as_json(report: ReadinessReport, strict: bool = False) -> str:
    """The object of `check --json`."""
    return dumps(report.to_json(), ascii_only=True)


def as_github(report: ReadinessReport, strict: bool = False) -> str:
    """A workflow command a finding, which GitHub shows on the run's page.

    Source: docs.github.com, "Workflow commands for GitHub Actions": `::error file=...,title=...::message`, with `%`,
    line ends, and in properties `:` and `,`, as percent escapes.
    """
    lines = []
    for finding in report.findings:
        title = _property(f"{report.consumer}: {finding.id}")
        lines.append(f"::{finding.severity} file={_property(report.checkpoint)},title={title}::{_data(_text(finding))}")
    lines += [f"::notice file={_property(report.checkpoint)}::{_data(note)}" for note in report.notes]
    return "".join(f"{line}\n" for line in lines)


def as_sarif(report: ReadinessReport, strict: bool = False) -> str:
    """One run of SARIF 2.1.0 (OASIS), as GitHub's code scanning takes it: the rules, and a result a finding.

    Notes, which say what could not be checked, are notifications of the run. GitHub wants a line of every place: the
    first one stands for a folder.
    """
    from tierewrite.consumers import consumer_named

    records = consumer_named(report.consumer).records
    titles = {finding.id: finding.id for finding in report.findings} | {rule.id: rule.title for rule in records}
    rules = [{"id": id, "shortDescription": {"text": title}} for id, title in titles.items()]
    results = [
        {
            "ruleId": finding.id,
            "level": finding.severity,
            "message": {"text": _text(finding)},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": quote(report.checkpoint, safe=_IN_URIS, errors="surrogateescape")},
                        "region": {"startLine": 1},
                    },
                    "logicalLocations": [{"fullyQualifiedName": escaped(name)} for name in finding.where[:100]],
                }
            ],
        }
        for finding in report.findings
    ]
    driver = {"name": "tierewrite", "version": tierewrite.__version__, "rules": rules}
    said = [{"level": "note", "message": {"text": escaped(note)}} for note in report.notes]
    invocation = {"executionSuccessful": True, "toolExecutionNotifications": said}
    run: dict[str, Any] = {"tool": {"driver": driver}, "invocations": [invocation], "results": results}
    return dumps({"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, ascii_only=True)


def as_junit(report: ReadinessReport, strict: bool = False) -> str:
    """A test case a finding, which failed if it is an error; one that passed where nothing was found.

    With `strict` warnings failed too: who reads reports may not look at exit codes. Notes are the suite's output.

    Source: the schema of Jenkins' xunit plugin (junit-10.xsd), which GitLab, Jenkins and others read.
    """
    name = f"{report.consumer} {report.consumer_version}"
    cases = len(report.findings) or 1
    failures = len(report.findings if strict else report.errors)
    suite = ElementTree.Element("testsuite", name=name, tests=str(cases), failures=str(failures), errors="0")
    for finding in report.findings:
        case = ElementTree.SubElement(suite, "testcase", classname=escaped(report.checkpoint), name=finding.id)
        if strict or finding.severity == "error":
            failure = ElementTree.SubElement(case, "failure", message=escaped(finding.found), type=finding.id)
            failure.text = _text(finding)
        else:
            ElementTree.SubElement(case, "system-out").text = _text(finding)
    if not report.findings:
        ElementTree.SubElement(suite, "testcase", classname=escaped(report.checkpoint), name="ready")
    if report.notes:
        ElementTree.SubElement(suite, "system-out").text = "\n".join(map(escaped, report.notes))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _text(finding: Finding) -> str:
    """A finding on one line: what, where, what happens, what to do."""
    fix = f". Fix: {finding.fix}" if finding.fix else ""
    return f"{escaped(finding.found)} [{some(finding.where)}]: {escaped(finding.consequence)}{escaped(fix)}"


def _data(text: str) -> str:
    return escaped(text).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


FORMATS: Mapping[str, Callable[[ReadinessReport, bool], str]] = {
    "json": as_json,
    "github": as_github,
    "sarif": as_sarif,
    "junit": as_junit,
}
"""What `check --format` takes beside "text"; each is told whether warnings count as errors (`--strict`)."""
