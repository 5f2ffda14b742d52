//! A warning that nobody expects is a failure.

use std::fmt::Write;
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use super::Check;

#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<String>>>);

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = write!(self.0, " {field}={value:?}");
    }
}

impl Subscriber for Collected {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(event.metadata().level().to_string());
        event.record(&mut text);
        self.0.lock().expect("no test panics here").push(text.0);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// Fails if the work, as far as it is done by this thread, warns of anything.
pub fn must_not_warn(work: impl FnOnce() -> Check) -> Check {
    let collected = Collected::default();
    let result = tracing::subscriber::with_default(collected.clone(), work);
    let warnings = collected.0.lock().expect("no test panics here");
    result?;
    crate::must!(warnings.is_empty(), "it warned: {warnings:?}");
    Ok(())
}

#[test]
fn canary_a_warning_is_noticed() {
    must_not_warn(|| Ok(())).unwrap();
    let noticed = must_not_warn(|| {
        tracing::warn!(what = "something", "odd");
        Ok(())
    });
    assert!(noticed.unwrap_err().contains("something"));
}
