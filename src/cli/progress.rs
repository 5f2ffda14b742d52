//! Progress bars on stderr, with rate and time left, for work of over a second.

use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A progress bar that shows itself once the work has taken a while. Cheap to clone.
#[derive(Clone)]
pub struct Progress {
    bar: Arc<ProgressBar>,
}

impl Progress {
    pub fn new(what: &str, shown: bool) -> Self {
        let target = if shown { ProgressDrawTarget::stderr_with_hz(5) } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(0), target).with_message(what.to_owned());
        Self { bar: Arc::new(bar) }
    }

    fn draw(&self, style: &str) {
        // Short work needs no bar, and a bar drawn and erased at once flickers.
        if self.bar.elapsed() > Duration::from_millis(500) {
            let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
            self.bar.set_style(style);
            self.bar.tick();
        }
    }

    /// So many bytes of so many are done.
    pub fn set_bytes(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.draw("{msg} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} eta {eta}");
    }

    /// So many things of so many are done.
    pub fn set_items(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.draw("{msg} {bar:30} {pos}/{len} {per_sec} eta {eta}");
    }

    /// So many bytes more are done.
    pub fn add_bytes(&self, bytes: u64, total: u64) {
        self.set_bytes(self.bar.position() + bytes, total);
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
