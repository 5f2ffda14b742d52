//! `epochfs verify`

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use super::context::Context;
use super::output::{parse_size, size};
use crate::epoch::{Verified, VerifyProgress};
use crate::error::Result;
use crate::platform::clock::{BootClock, Clock, Stopwatch};

/// How often it is noted how far a verification has come.
const NOTE_EVERY: Duration = Duration::from_secs(5);

/// Read the whole repository and check every byte and every reference.
///
/// Exits with 3 when damage was found, and lists the objects that are damaged and the epochs that need them, with their
/// streams and pages. `epochfs repair` puts in place again what has another copy.
///
/// How far it has come is noted in the state directory. One that was interrupted, however it was, goes on there with
/// --resume; without it, each begins anew.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs verify\n  epochfs verify --rate 50M                    (beside VMs that use the same disk)\n  epochfs verify --data --resume --rate 50M    (go on where the last one was interrupted; for timers)"
)]
pub struct Verify {
    /// Read at most so many bytes a second, like 50M.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    rate: Option<u64>,
    /// Go on where the last verification on this host was interrupted, if it was; what it found damaged is read again.
    #[arg(long)]
    resume: bool,
    /// Read the data too, which `verify` always does.
    #[arg(long)]
    #[allow(dead_code, reason = "whoever leaves it out gets the same")]
    data: bool,
}

impl Verify {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.open_without_cache()?;
        let bar = context.progress("verifying");
        let mut limit = rate_limit(self.rate);
        let file = context.local_directory(&store).join("verify.json");
        let progress = VerifyProgress { file, resume: self.resume, every: NOTE_EVERY };
        let verified = store.verify_from(Some(&progress), &mut |done, total| {
            bar.set_bytes(done, total);
            limit(done);
        })?;
        bar.finish();
        let mut document = serde_json::to_value(&verified).unwrap_or_else(|error| json!({"error": error.to_string()}));
        document["whole"] = json!(verified.is_whole());
        context.print(&document, || {
            let mut text = damage_in_words(&verified);
            for key in &verified.unknown_objects {
                text += &format!("unknown  {key}\n");
            }
            if verified.resumed_at_bytes > 0 {
                text += &format!("{} of it were read by an earlier verification\n", size(verified.resumed_at_bytes));
            }
            text + &format!(
                "{} objects with {} and {} pages read, {} epochs of {} machines followed: {}\n",
                verified.objects,
                size(verified.bytes),
                verified.pages,
                verified.epochs,
                verified.machines,
                if verified.is_whole() {
                    "all is whole".to_owned()
                } else {
                    format!(
                        "{} objects or blocks are damaged, {} epochs or streams cannot be read whole",
                        verified.problems.len(),
                        verified.broken_epochs.len()
                    )
                }
            )
        })?;
        Ok(if verified.is_whole() { ExitCode::SUCCESS } else { ExitCode::from(3) })
    }
}

/// Everything that is damaged, a line each.
pub(super) fn damage_in_words(verified: &Verified) -> String {
    let mut text = String::new();
    for problem in &verified.problems {
        text += &format!("damaged  {}: {}\n", problem.object, problem.problem);
    }
    for broken in &verified.broken_epochs {
        let stream = broken.stream.as_ref().map_or(String::new(), |stream| format!(", stream {stream}"));
        text += &format!("broken   {}@{}{stream}: {}\n", broken.machine, broken.epoch, broken.problem);
        for range in &broken.ranges {
            text += &match range.pages {
                1 => format!("           page {}\n", range.first),
                pages => format!("           pages {} to {}\n", range.first, range.first + pages - 1),
            };
        }
    }
    text
}

/// Waits, told how many bytes were read, as long as that is more than so many a second. What an earlier verification had
/// read when this one began counts for nothing.
pub(super) fn rate_limit(rate: Option<u64>) -> impl FnMut(u64) {
    let (watch, clock) = (Stopwatch::start(), BootClock);
    let mut before = None;
    move |done: u64| {
        let Some(rate) = rate else { return };
        let before = *before.get_or_insert(done);
        let due = Duration::from_secs_f64(done.saturating_sub(before) as f64 / rate.max(1) as f64);
        clock.sleep(due.saturating_sub(watch.elapsed()));
    }
}
