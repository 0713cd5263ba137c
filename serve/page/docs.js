// Renders `openapi.json` (OpenAPI 3.1): every operation with a curl line, every schema with its fields.

import { element } from "./element.js";
import { call } from "./service.js";

const $ = (id) => document.getElementById(id);
const METHODS = ["get", "post", "put", "patch", "delete"];
const LIMITS = {
  minimum: "≥", maximum: "≤", exclusiveMinimum: ">", exclusiveMaximum: "<",
  minLength: "length ≥", maxLength: "length ≤", minItems: "items ≥", maxItems: "items ≤", maxProperties: "entries ≤", pattern: "pattern", format: "format",
};

const code = (text) => element("code", {}, text);
const nameOf = (reference) => reference.split("/").at(-1);

function table(caption, heads, rows) {
  if (!rows.length) return null;
  const cells = (name, row) => element("tr", {}, row.map((cell) => element(name, {}, cell ?? "")));
  return element("div", { className: "wide", tabIndex: 0, role: "region", ariaLabel: caption }, element("table", {},
    element("caption", {}, caption),
    element("thead", {}, cells("th", heads)),
    element("tbody", {}, rows.map((row) => cells("td", row)))));
}

/** A schema in words, as nodes: other schemas are links. */
function typeOf(schema = {}) {
  if (schema.$ref) return [element("a", { href: `#schema-${nameOf(schema.$ref)}` }, nameOf(schema.$ref))];
  const choices = schema.anyOf ?? schema.oneOf ?? schema.allOf;
  if (choices) return choices.flatMap((choice, i) => [i ? (schema.allOf ? " and " : " or ") : "", ...typeOf(choice)]);
  if ("const" in schema) return [JSON.stringify(schema.const)];
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(" | ")];
  const limits = Object.entries(LIMITS).filter(([key]) => key in schema).map(([key, sign]) => `${sign} ${schema[key]}`);
  const bounds = limits.length ? ` (${limits.join(", ")})` : "";
  if (schema.type === "array") return ["list of ", ...typeOf(schema.items), bounds];
  const values = schema.type === "object" && schema.additionalProperties;
  if (values) return ["map of string to ", ...typeOf(values === true ? {} : values), bounds];
  if (schema.properties && schema.title) return [schema.title];
  return [`${[schema.type ?? "anything"].flat().join(" or ")}${bounds}`];
}

/** The least that a schema accepts; of optional properties the first, so that there is something to see. */
function exampleOf(schema, schemas) {
  if (schema.$ref) return exampleOf(schemas[nameOf(schema.$ref)], schemas);
  const given = schema.example ?? schema.examples?.[0] ?? schema.default ?? schema.const ?? schema.enum?.[0];
  if (given !== undefined) return given;
  const choices = schema.anyOf ?? schema.oneOf ?? schema.allOf;
  if (choices) return exampleOf(choices[0], schemas);
  if (schema.type === "array") return [exampleOf(schema.items ?? {}, schemas)];
  if (schema.type === "object") {
    const names = schema.required ?? Object.keys(schema.properties ?? {}).slice(0, 1);
    return Object.fromEntries(names.map((name) => [name, exampleOf(schema.properties[name], schemas)]));
  }
  return { integer: schema.minimum ?? 0, number: schema.minimum ?? 0, boolean: false, null: null }[schema.type] ?? "…";
}

function curlOf(method, path, { parameters = [], requestBody, security }, api) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const query = parameters.filter((parameter) => parameter.in === "query")
    .map(({ name, schema }) => `${name}=${exampleOf(schema, api.components?.schemas)}`).join("&");
  const parts = ["curl"];
  if (method !== "get" && !(method === "post" && requestBody)) parts.push(`-X ${method.toUpperCase()}`);
  const guarded = (security ?? api.security ?? []).length || sessionStorage.getItem("token");
  if (guarded) parts.push('-H "Authorization: Bearer $TOKEN"');
  const [type, body] = Object.entries(requestBody?.content ?? {})[0] ?? [];
  if (type) parts.push(`-H ${quoted(`Content-Type: ${type}`)}`);
  if (type) parts.push(`--data ${quoted(JSON.stringify(exampleOf(body.schema, api.components?.schemas)))}`);
  const url = new URL(path.slice(1), document.baseURI).href;
  return [...parts, quoted(decodeURI(query ? `${url}?${query}` : url))].join(" ");
}

const contentOf = (content = {}) => Object.entries(content).map(([type, { schema }]) => [
  element("div", {}, code(type), " ", typeOf(schema)),
]);

function operationOf(method, path, operation, api) {
  const id = `${method}${path}`;
  const { summary, description, parameters = [], requestBody, responses = {} } = operation;
  return element("article", { id },
    element("h2", {}, element("span", { className: `method ${method}` }, method.toUpperCase()), " ", code(path)),
    element("p", { className: "summary" }, summary),
    description && element("p", { className: "text" }, description),
    table("Parameters", ["name", "in", "type", "default", "description"], parameters.map((parameter) => [
      code(parameter.name), `${parameter.in}${parameter.required ? ", required" : ""}`, typeOf(parameter.schema),
      "default" in parameter.schema ? code(JSON.stringify(parameter.schema.default)) : "",
      parameter.description ?? parameter.schema.description,
    ])),
    requestBody && element("h3", {}, "Request"),
    contentOf(requestBody?.content),
    table("Responses", ["status", "description", "body"], Object.entries(responses).map(([status, response]) => [
      code(status), response.description, contentOf(response.content),
    ])),
    element("pre", { tabIndex: 0, ariaLabel: "curl" }, code(curlOf(method, path, operation, api))));
}

function schemaOf([name, schema]) {
  const heads = ["field", "type", "default", "description"];
  const fields = Object.entries(schema.properties ?? {}).map(([field, type]) => [
    code(field),
    typeOf(type),
    schema.required?.includes(field) ? "required" : "default" in type ? code(JSON.stringify(type.default)) : "",
    type.description,
  ]);
  return element("article", { id: `schema-${name}` },
    element("h2", {}, name),
    schema.description && element("p", { className: "text" }, schema.description),
    table(`Fields of ${name}`, heads, fields) ?? element("p", {}, typeOf(schema)));
}

try {
  const api = await (await call("openapi.json")).json();
  document.title = `${api.info.title}: API`;
  $("title").textContent = api.info.title;
  $("version").textContent = `version ${api.info.version}, OpenAPI ${api.openapi}`;
  $("description").textContent = api.info.description ?? "";
  const operations = Object.entries(api.paths).flatMap(([path, methods]) => METHODS
    .filter((method) => method in methods).map((method) => [method, path, methods[method]]));
  const schemas = Object.entries(api.components?.schemas ?? {});
  $("operations").append(...operations.map((operation) => operationOf(...operation, api)));
  $("schemas").append(...schemas.map(schemaOf));
  $("contents").append(
    ...operations.map(([method, path]) => (
      element("a", { href: `#${method}${path}` }, `${method.toUpperCase()} ${path}`))),
    ...schemas.map(([name]) => element("a", { href: `#schema-${name}` }, name)),
  );
  if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
} catch (error) {
  $("error").textContent = error.message;
  $("error").hidden = false;
}
