//! Wall-clock time, for people only: no decision about safety depends on it. And how long things take.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Nanoseconds since 1970, or 0 on a machine whose clock is before that.
#[allow(clippy::disallowed_methods)] // The one place that reads the clock.
pub fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| u64::try_from(elapsed.as_nanos()).unwrap_or(0))
}

/// Reads a whole number with one of these units behind it, each with its length in milliseconds.
pub fn parse(text: &str, units: &[(&str, u64)]) -> Option<Duration> {
    let digits = text.trim_end_matches(|letter: char| letter.is_alphabetic());
    let (_, unit) = units.iter().find(|(name, _)| *name == &text[digits.len()..])?;
    unit.checked_mul(digits.parse().ok()?).map(Duration::from_millis)
}

/// Measures how long something takes.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    #[allow(clippy::disallowed_methods)] // The one place that reads the clock.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    pub fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

/// How long this machine runs, and waiting. Only differences mean anything, and only on the machine that measured them:
/// no two machines' clocks are ever compared.
pub trait Clock: Send + Sync {
    /// Time since some moment, including what the machine slept.
    fn elapsed(&self) -> Duration;

    fn sleep(&self, duration: Duration);
}

/// This machine's.
#[derive(Clone, Copy, Debug, Default)]
pub struct BootClock;

impl Clock for BootClock {
    fn elapsed(&self) -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let (seconds, nanoseconds) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
        Duration::new(seconds.unwrap_or(0), nanoseconds.unwrap_or(0))
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}
