//! The API's description, which every answer that a test gets is held against.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use jsonschema::Validator;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

/// The document.
pub(crate) static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
    serde_norway::from_str(include_str!("../../../src/api/openapi.yaml")).expect("the document is YAML")
});

/// What is wrong with a value that should be one of a schema's; nothing where it is.
pub(crate) fn errors_of(schema: &str, value: &Value) -> Vec<String> {
    static VALIDATORS: LazyLock<Mutex<HashMap<String, Validator>>> = LazyLock::new(Mutex::default);
    let mut validators = VALIDATORS.lock().unwrap_or_else(PoisonError::into_inner);
    let validator = validators.entry(schema.to_owned()).or_insert_with(|| {
        let whole = json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "$ref": format!("#/components/schemas/{schema}"),
            "components": DOCUMENT["components"],
        });
        jsonschema::validator_for(&whole).unwrap()
    });
    validator.iter_errors(value).map(|error| format!("{}: {error}", error.instance_path())).collect()
}

/// Holds an answer of the API against what the document says of it.
pub(crate) fn check(method: &Method, path: &str, status: StatusCode, body: &Value) {
    let path = path.split('?').next().unwrap();
    if path.starts_with("/v1/") || !body.is_object() {
        // Nomad's, or no JSON.
        return;
    }
    let operation = operation(path).map(|operations| &operations[method.as_str().to_lowercase()]);
    let schema = match operation {
        // No such route, or it does not take this method.
        None | Some(Value::Null) => "ErrorAnswer",
        Some(operation) => {
            let answer = &operation["responses"][status.as_str()];
            assert!(!answer.is_null(), "{method} {path}: the document knows no {status}: {body}");
            let answer = match answer["$ref"].as_str() {
                Some(name) => DOCUMENT.pointer(name.strip_prefix('#').unwrap()).unwrap(),
                None => answer,
            };
            let schema = answer["content"]["application/json"]["schema"]["$ref"].as_str();
            let Some(schema) = schema else { return };
            schema.rsplit('/').next().unwrap()
        }
    };
    let errors = errors_of(schema, body);
    assert!(errors.is_empty(), "{method} {path}: {status} is no {schema}: {errors:?}: {body}");
}

/// What there is to do at a path.
fn operation(path: &str) -> Option<&'static Value> {
    let matches = |pattern: &str| {
        let (mut of, mut parts) = (pattern.split('/'), path.split('/'));
        loop {
            match (of.next(), parts.next()) {
                (None, None) => return true,
                (Some(of), Some(part)) if of.starts_with('{') || of == part => {}
                _ => return false,
            }
        }
    };
    let paths = DOCUMENT["paths"].as_object().unwrap();
    paths.iter().find(|(pattern, _)| matches(pattern)).map(|(_, operations)| operations)
}
