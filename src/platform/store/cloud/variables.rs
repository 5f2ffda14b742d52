//! The variables that say how to reach a service: those of this process's environment, or what an embedding program says.

use std::collections::BTreeMap;
use std::str::FromStr;

/// Variables by name. They may hold secrets: they are neither printed nor logged.
#[derive(Clone, Default)]
pub struct Variables(BTreeMap<String, String>);

impl Variables {
    /// Those of this process's environment, as far as they are text.
    pub fn of_process() -> Self {
        Self::of(
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))),
        )
    }

    pub fn of(variables: impl IntoIterator<Item = (impl Into<String>, impl Into<String>)>) -> Self {
        Self(variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }

    /// A variable that is set, and not to nothing.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Whether a variable is set, and to no word for false.
    pub fn is_true(&self, name: &str) -> bool {
        self.get(name).is_some_and(|value| !["0", "f", "false", "n", "no", "off"].contains(&&*value.to_lowercase()))
    }

    /// Tells a builder each variable that it knows: `AWS_REGION` is its setting `aws_region`.
    pub(super) fn configure<B, K: FromStr>(&self, builder: B, prefix: &str, with: impl Fn(B, K, String) -> B) -> B {
        let ours = self.0.iter().filter(|(name, value)| name.starts_with(prefix) && !value.is_empty());
        ours.fold(builder, |builder, (name, value)| match name.to_lowercase().parse() {
            Ok(key) => with(builder, key, value.clone()),
            Err(_) => builder,
        })
    }
}
