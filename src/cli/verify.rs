//! `epochfs verify`

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use super::context::Context;
use super::output::{parse_size, size};
use crate::error::Result;
use crate::platform::clock::{BootClock, Clock, Stopwatch};

/// Read the whole repository and check every byte and every reference.
///
/// Exits with 3 when damage was found, and lists the objects that are damaged and the epochs that need them.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  epochfs verify\n  epochfs verify --rate 50M (beside VMs that use the same disk)")]
pub struct Verify {
    /// Read at most so many bytes a second, like 50M.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    rate: Option<u64>,
}

impl Verify {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.open_without_cache()?;
        let bar = context.progress("verifying");
        let (watch, clock) = (Stopwatch::start(), BootClock);
        let verified = store.verify(&mut |done, total| {
            bar.set_bytes(done, total);
            if let Some(rate) = self.rate {
                let due = Duration::from_secs_f64(done as f64 / rate.max(1) as f64);
                clock.sleep(due.saturating_sub(watch.elapsed()));
            }
        })?;
        bar.finish();
        let mut document = serde_json::to_value(&verified).unwrap_or_else(|error| json!({"error": error.to_string()}));
        document["whole"] = json!(verified.is_whole());
        context.print(&document, || {
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
            for key in &verified.unknown_objects {
                text += &format!("unknown  {key}\n");
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
