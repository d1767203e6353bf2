"""The OpenAPI document: made from the tables of pages and actions, and of what pip, uv and twine speak."""

import re
from typing import Any

import msgspec

from palestra import __version__
from palestra.hub.registry.actions import ACTIONS
from palestra.hub.registry.ask import Action, Page
from palestra.hub.registry.pages import PAGES

_REF = "#/components/schemas/{name}"
_TEXTS = {
    "400": "something that cannot be",
    "401": "a token is needed, or this one is none",
    "403": "the token has no such right",
    "404": "there is no such thing, or the token may not see it",
    "409": "something else is there already",
    "413": "too large",
}
_PROBLEM = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}


def document() -> dict[str, Any]:
    """Of version 3.1."""
    kinds = [one.answer for one in (*PAGES, *ACTIONS)]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    paths: dict[str, Any] = {}
    for page, schema in zip(PAGES, schemas, strict=False):
        paths[f"{page.path}.json"] = {"get": _page(page, schema)}
    for action, schema in zip(ACTIONS, schemas[len(PAGES) :], strict=True):
        paths[action.path] = {"post": _action(action, schema)}
    tokens = {"bearer": {"type": "http", "scheme": "bearer"}, "basic": {"type": "http", "scheme": "basic"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "palestra hub",
            "version": __version__,
            "description": "Environments, their versions and who may what. Paths without .json are the pages.",
        },
        "security": [{"bearer": []}, {"basic": []}, {}],
        "paths": paths,
        "components": {"schemas": dict(components) | {"Problem": _PROBLEM}, "securitySchemes": tokens},
    }


def _page(page: Page, schema: dict[str, Any]) -> dict[str, Any]:
    found = page.query.model_json_schema()
    parameters = [
        {"name": name, "in": "query", "required": name in found.get("required", []), "schema": of}
        for name, of in found.get("properties", {}).items()
    ]
    return {
        "operationId": page.view.__name__,
        "summary": page.title,
        "parameters": [*_of_path(page.path), *parameters],
        "responses": _responses(page.title, schema, ("400", "401", "403", "404")),
    }


def _action(action: Action, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "operationId": action.act.__name__,
        "summary": action.title,
        "parameters": _of_path(action.path),
        "requestBody": {"content": {"application/json": {"schema": action.body.model_json_schema()}}},
        "responses": _responses(action.title, schema, tuple(_TEXTS)),
    }


def _of_path(path: str) -> list[dict[str, Any]]:
    names = re.findall(r"{(\w+)}", path)
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]


def _responses(title: str, schema: dict[str, Any], problems: tuple[str, ...]) -> dict[str, Any]:
    problem = {"content": {"application/json": {"schema": {"$ref": _REF.format(name="Problem")}}}}
    found: dict[str, Any] = {"200": {"description": title, "content": {"application/json": {"schema": schema}}}}
    return found | {status: {"description": _TEXTS[status], **problem} for status in problems}
