//! Reading a JSON object field by field, keeping every error instead of the first.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde_json::{Map, Value};

/// What is wrong with one field of a submission.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct FieldError {
    /// The field's path: `image_tags[1]`, `resources.build.cpu`.
    pub field: String,
    /// What is wrong, and how to mend it.
    pub message: String,
}

/// A submission that was refused, with everything that is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the submission has {} invalid field(s): {}", .0.len(), summary(.0))]
pub struct Invalid(pub Vec<FieldError>);

fn summary(errors: &[FieldError]) -> String {
    errors.iter().map(|error| format!("{} {}", error.field, error.message)).collect::<Vec<_>>().join("; ")
}

/// An object being read. What is not taken by the end is an unknown field.
pub(super) struct Fields {
    prefix: String,
    rest: Map<String, Value>,
    errors: Vec<FieldError>,
}

impl Fields {
    pub(super) fn new(prefix: &str, value: Value) -> Self {
        let mut fields = Self { prefix: prefix.to_owned(), rest: Map::new(), errors: Vec::new() };
        match value {
            Value::Object(rest) => fields.rest = rest,
            other => fields.wrong("", &format!("is {}: an object is wanted", kind(&other))),
        }
        fields
    }

    fn path(&self, name: &str) -> String {
        match (self.prefix.as_str(), name) {
            ("", name) => name.to_owned(),
            (prefix, "") => prefix.to_owned(),
            (prefix, name) => format!("{prefix}.{name}"),
        }
    }

    /// Notes an error of a field of this object.
    pub(super) fn wrong(&mut self, name: &str, message: &str) {
        let field = self.path(name);
        self.errors.push(FieldError { field, message: message.to_owned() });
    }

    /// Takes a field as it is; null is the same as absent.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.rest.remove(name).filter(|value| !value.is_null())
    }

    /// Takes a text, which may be absent.
    pub(super) fn text(&mut self, name: &str) -> Option<String> {
        match self.take(name)? {
            Value::String(text) if text.contains('\0') => {
                self.wrong(name, "has a NUL character");
                None
            }
            Value::String(text) => Some(text),
            other => {
                self.wrong(name, &format!("is {}: a string is wanted", kind(&other)));
                None
            }
        }
    }

    /// Takes a text with a grammar, which may be absent.
    pub(super) fn parsed<T: FromStr<Err = String>>(&mut self, name: &str) -> Option<T> {
        let text = self.text(name)?;
        text.parse().map_err(|why: String| self.wrong(name, &why)).ok()
    }

    /// Takes a text with a grammar, which must be there.
    pub(super) fn required<T: FromStr<Err = String>>(&mut self, name: &str) -> Option<T> {
        if self.rest.get(name).is_none_or(Value::is_null) {
            self.rest.remove(name);
            self.wrong(name, "is missing");
            return None;
        }
        self.parsed(name)
    }

    pub(super) fn boolean(&mut self, name: &str) -> bool {
        match self.take(name) {
            None => false,
            Some(Value::Bool(value)) => value,
            Some(other) => {
                self.wrong(name, &format!("is {}: true or false is wanted", kind(&other)));
                false
            }
        }
    }

    /// Takes a whole number within bounds, which may be absent.
    pub(super) fn number(&mut self, name: &str, least: u64, most: u64) -> Option<u64> {
        let value = self.take(name)?;
        let number = whole(&value).filter(|number| (least..=most).contains(number));
        if number.is_none() {
            self.wrong(name, &format!("must be a whole number from {least} to {most}"));
        }
        number
    }

    /// Takes a list of texts with a grammar; absent is empty.
    pub(super) fn list<T: FromStr<Err = String>>(&mut self, name: &str) -> Vec<T> {
        let items = match self.take(name) {
            None => return Vec::new(),
            Some(Value::Array(items)) => items,
            Some(other) => {
                self.wrong(name, &format!("is {}: a list of strings is wanted", kind(&other)));
                return Vec::new();
            }
        };
        let mut list = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            let parsed = match item {
                Value::String(text) if text.contains('\0') => Err("has a NUL character".to_owned()),
                Value::String(text) => text.parse(),
                other => Err(format!("is {}: a string is wanted", kind(&other))),
            };
            match parsed {
                Ok(value) => list.push(value),
                Err(why) => self.wrong(&format!("{name}[{index}]"), &why),
            }
        }
        list
    }

    /// Takes an object of texts, its keys and values checked; absent is empty.
    pub(super) fn map(
        &mut self,
        name: &str,
        check: impl Fn(&str, &str) -> Result<(), String>,
    ) -> BTreeMap<String, String> {
        let entries = match self.take(name) {
            None => return BTreeMap::new(),
            Some(Value::Object(entries)) => entries,
            Some(other) => {
                self.wrong(name, &format!("is {}: an object of strings is wanted", kind(&other)));
                return BTreeMap::new();
            }
        };
        let mut map = BTreeMap::new();
        for (key, value) in entries {
            let checked = match &value {
                Value::String(text) if text.contains('\0') => Err("has a NUL character".to_owned()),
                Value::String(text) => check(&key, text),
                other => Err(format!("is {}: a string is wanted", kind(other))),
            };
            match (checked, value) {
                (Ok(()), Value::String(text)) => drop(map.insert(key, text)),
                (Err(why), _) => self.wrong(&format!("{name}.{key}"), &why),
                (Ok(()), _) => {}
            }
        }
        map
    }

    /// Reads an object inside this one; absent is an empty object.
    pub(super) fn nested<T>(&mut self, name: &str, read: impl FnOnce(&mut Self) -> T) -> T {
        let value = self.take(name).unwrap_or_else(|| Value::Object(Map::new()));
        let mut inner = Self::new(&self.path(name), value);
        let result = read(&mut inner);
        self.errors.extend(inner.into_errors());
        result
    }

    /// Everything that is wrong, unknown fields included.
    pub(super) fn into_errors(mut self) -> Vec<FieldError> {
        for name in std::mem::take(&mut self.rest).into_iter().map(|(name, _)| name) {
            self.wrong(&name, "is not a known field: check its spelling or leave it out");
        }
        self.errors
    }
}

/// Takes a text out of an object, which may be absent: what is read before the rest, and apart from it.
///
/// # Errors
/// Where it is something else.
pub fn take_text(object: &mut Value, name: &str) -> Result<Option<String>, FieldError> {
    match object.as_object_mut().and_then(|fields| fields.remove(name)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => {
            let message = format!("is {}: a string is wanted", kind(&other));
            Err(FieldError { field: name.to_owned(), message })
        }
    }
}

/// A whole number, however it is written: for JSON, 10.0 is one.
fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_f64().filter(|number| number.fract() == 0.0)?.to_string().parse().ok())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_number_is_whole_however_it_is_written() {
        for (value, want) in [
            (json!(10), Some(10)),
            (json!(10.0), Some(10)),
            (json!(1e1), Some(10)),
            (json!(10.5), None),
            (json!(0.0), None),
            (json!(-1.0), None),
            (json!(1e300), None),
            (json!("10"), None),
        ] {
            let mut fields = Fields::new("", json!({ "a": value }));
            assert_eq!(fields.number("a", 1, 100), want);
            assert_eq!(fields.into_errors().is_empty(), want.is_some());
        }
    }
}
