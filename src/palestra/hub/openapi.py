"""The OpenAPI document: made from the table of pages, so that it cannot tell anything else."""

import re
from typing import Any

import msgspec

from palestra import __version__
from palestra.hub.pages import PAGES, Page
from palestra.hub.queries import Events

_REF = "#/components/schemas/{name}"


def document() -> dict[str, Any]:
    """Of version 3.1."""
    answers = [page.answer for page in PAGES]
    schemas, components = msgspec.json.schema_components(answers, ref_template=_REF)
    paths = {f"{page.path}.json": _path(page, schema) for page, schema in zip(PAGES, schemas, strict=True)}
    paths["/events"] = _events()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "palestra viewer",
            "version": __version__,
            "description": "Runs, their curves, time ledgers and rollouts. Every path without .json is the page.",
        },
        "paths": paths,
        "components": {"schemas": dict(components) | {"Problem": _PROBLEM}},
    }


_PROBLEM = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}


def _path(page: Page, schema: dict[str, Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", page.path)
    ]
    problem = {"content": {"application/json": {"schema": {"$ref": _REF.format(name="Problem")}}}}
    return {
        "get": {
            "operationId": page.view.__name__,
            "summary": page.title,
            "parameters": [*parameters, *_of_query(page.query)],
            "responses": {
                "200": {"description": page.title, "content": {"application/json": {"schema": schema}}},
                "400": {"description": "a parameter that cannot be", **problem},
                "404": {"description": "there is no such thing", **problem},
            },
        }
    }


def _of_query(query: Any) -> list[dict[str, Any]]:
    schema = query.model_json_schema()
    required = schema.get("required", [])
    found = []
    for name, of in schema.get("properties", {}).items():
        of = {key: value for key, value in of.items() if key != "title"}
        text = {"description": of.pop("description")} if "description" in of else {}
        found.append({"name": name, "in": "query", "required": name in required, "schema": of, **text})
    return found


def _events() -> dict[str, Any]:
    return {
        "get": {
            "operationId": "events",
            "summary": "Server-sent events: which kinds of a run's files have changed",
            "parameters": _of_query(Events),
            "responses": {"200": {"description": "a stream", "content": {"text/event-stream": {}}}},
        }
    }
