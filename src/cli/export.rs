//! `epochfs export`

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::OsStringValueParser;
use serde_json::json;

use super::context::Context;
use super::output::size;
use crate::epoch::{self, EpochName};
use crate::error::Result;
use crate::platform::clock::Stopwatch;

/// Write an epoch's streams to files, sparse, with every page verified.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs export web1@17 --output /tmp/web1\n  epochfs export web1 --output /tmp/web1 --stream memory"
)]
pub struct Export {
    /// The epoch; the newest where none is named.
    #[arg(value_name = "MACHINE[@EPOCH]")]
    epoch: EpochName,
    /// The directory to write to. Files that exist in it are not overwritten.
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Only this stream; may be repeated.
    #[arg(long, value_name = "STREAM", value_parser = OsStringValueParser::new())]
    stream: Vec<OsString>,
}

impl Export {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let started = Stopwatch::start();
        let store = context.open()?;
        let epoch = store.epoch(&self.epoch)?;
        let only: Vec<Vec<u8>> = self.stream.iter().map(|name| name.clone().into_vec()).collect();
        let bar = context.progress(&format!("exporting {}", epoch.name()));
        let total = epoch.manifest().logical_len();
        let exported = epoch::export(&epoch, &only, &self.output, &|bytes| bar.add_bytes(bytes, total))?;
        bar.finish();
        let elapsed = started.elapsed();
        let document = json!({
            "machine": &**epoch.machine(),
            "epoch": epoch.number(),
            "directory": self.output.display().to_string(),
            "files": exported.files,
            "logical_bytes": exported.logical_bytes,
            "written_bytes": exported.written_bytes,
            "elapsed_ms": elapsed.as_secs_f64() * 1000.0,
        });
        context.print(&document, || {
            format!(
                "exported {} to {}: {} files of {}, {} written, all verified, in {:.3} s\n",
                epoch.name(),
                self.output.display(),
                exported.files,
                size(exported.logical_bytes),
                size(exported.written_bytes),
                elapsed.as_secs_f64()
            )
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
