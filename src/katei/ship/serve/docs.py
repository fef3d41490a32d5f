"""The OpenAPI description as a page: made here, so that it needs no network and no script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; border-top: 1px solid #8884; padding-top: 1.2rem; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 1rem 0 .2rem; }
b { font-weight: 600; padding: .1rem .45rem; border-radius: .3rem; background: #4472c433; font-size: .85rem; }
code, pre { font: .86rem/1.45 ui-monospace, monospace; }
pre { background: #8882; padding: .7rem; border-radius: .4rem; overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem .8rem; margin: .3rem 0; }
dt { font: .86rem/1.7 ui-monospace, monospace; } dd { margin: 0; } i { color: #888; font-style: normal; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { padding-left: 1rem; } }
"""


def docs_html(api: Mapping[str, Any]) -> str:
    """A page of every endpoint: what goes in, what comes out, and a line to type."""
    schemas = api.get("components", {}).get("schemas", {})
    body = [
        f"<h1>{escape(api['info']['title'])} {escape(api['info']['version'])}</h1>",
        f"<p>{_prose(api['info'].get('description', ''))}</p>",
        '<p>The same for programs: <a href="openapi.json">openapi.json</a>. The page to try it on: <a href="./">/</a>.</p>',
    ]
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            body += _operation(path, method.upper(), operation, schemas)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>katei: endpoints</title><style>{STYLE}</style><main>{''.join(body)}</main></html>"
    )


def _operation(path: str, method: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> list[str]:
    out = [
        f"<h2><b>{method}</b> <code>{escape(path)}</code></h2>",
        f"<p>{_prose(operation.get('description', ''))}</p>",
    ]
    asked = _resolve(_schema_of(operation.get("requestBody", {})), schemas)
    if asked:
        out += ["<h3>Body (JSON)</h3>", _fields(asked, schemas)]
    answers = operation.get("responses", {})
    given = _resolve(_schema_of(answers.get("200", {})), schemas)
    if given.get("properties"):
        out += ["<h3>Answer (200, JSON)</h3>", _fields(given, schemas)]
    errors = [(code, answer) for code, answer in answers.items() if code != "200"]
    if errors:
        rows = "".join(f"<dt>{escape(code)}</dt><dd>{escape(answer['description'])}</dd>" for code, answer in errors)
        out.append(f"<h3>Errors: <code>{{&quot;error&quot;: {{kind, message, hint}}}}</code></h3><dl>{rows}</dl>")
    line = f"curl http://127.0.0.1:8000{path}"
    if asked:
        example = json.dumps(_example(asked), ensure_ascii=False)
        line += f" \\\n  -H 'Content-Type: application/json' -d '{example}'"
    out.append(f"<pre>{escape(line)}</pre>")
    return out


def _schema_of(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    schema: Mapping[str, Any] = holder.get("content", {}).get("application/json", {}).get("schema", {})
    return schema


def _resolve(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref")
    return schemas[reference.rsplit("/", 1)[-1]] if reference else schema


def _fields(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = f" <i>[{escape(json.dumps(field['default']))}]</i>" if field.get("default") is not None else ""
        kind = f"<code>{escape(_kind(field, schemas))}</code>{default}"
        rows.append(f"<dt>{escape(name)}</dt><dd>{kind} {_prose(field.get('description', ''))}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _kind(field: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " | ".join(_kind(one, schemas) for one in field["anyOf"])
    if "$ref" in field:
        inner = _resolve(field, schemas)
        return "{" + ", ".join(f"{n}: {_kind(f, schemas)}" for n, f in inner.get("properties", {}).items()) + "}"
    if field.get("type") == "array":
        return f"[{_kind(field['items'], schemas)}, …]"
    if field.get("type") == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"{{NAME: {_kind(field['additionalProperties'], schemas)}}}"
    return str(field.get("type", "any"))


def _example(schema: Mapping[str, Any]) -> dict[str, Any]:
    fields = schema.get("properties", {})
    return {name: field["examples"][0] for name, field in fields.items() if field.get("examples")}


def _prose(text: str) -> str:
    """Escaped, with `code` as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
