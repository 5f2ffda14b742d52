//! `epochfs verify`

use std::process::ExitCode;

use serde_json::json;

use super::context::Context;
use super::output::size;
use crate::error::Result;

/// Read the whole repository and check every byte and every reference.
///
/// Exits with 3 when damage was found, and lists the objects that are damaged and the epochs that need them.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  epochfs verify")]
pub struct Verify {}

impl Verify {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.open_without_cache()?;
        let bar = context.progress("verifying");
        let verified = store.verify(&mut |done, total| bar.set_bytes(done, total))?;
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
