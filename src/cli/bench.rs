//! `epochfs bench`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use serde_json::json;

use super::context::Context;
use super::output::table;
use crate::error::Result;
use crate::ops::bench::{Figure, PARTS, Part, Settings, measure};
use crate::ops::machine::{Machine, file_system_of};

/// Measure what this host can do: hashing, compressing, writing, finding pages, committing.
///
/// Needs no repository: a scratch one is made in --dir and removed afterwards.
///
/// The image that is committed is made up. Of 100 pages about 70 are zeros, 6 repeat one of 64 pages and 24 are unlike
/// all others; what is not zeros is half random bytes and half text, which zstd about halves. That is meant to be as
/// hard as a real guest's memory, but it is no guest: `epochfs commit --json` measures yours. The image is in the page
/// cache when it is read.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs bench\n  epochfs bench store --dir /srv/epochs\n  epochfs bench epochs --size 4096 --json\n\nHow other tools fare with the same image is measured by scripts/bench-peers."
)]
pub struct Bench {
    /// What to measure; everything if nothing is named.
    #[arg(value_enum, value_name = "PART")]
    parts: Vec<PartArgument>,
    /// Where scratch files go: the file system that is measured.
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
    /// The length of the image that is committed, in MiB.
    #[arg(long, value_name = "MiB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(8..=1 << 20))]
    size: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PartArgument {
    /// Hashing, scanning for zeros, compressing: no files
    Processor,
    /// Writing, reading and syncing objects
    Store,
    /// Adding to and asking the page index
    Index,
    /// Committing and exporting whole images
    Epochs,
}

impl PartArgument {
    fn part(self) -> Part {
        match self {
            Self::Processor => Part::Processor,
            Self::Store => Part::Store,
            Self::Index => Part::Index,
            Self::Epochs => Part::Epochs,
        }
    }
}

impl Bench {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let mut parts: Vec<Part> = self.parts.iter().map(|part| part.part()).collect();
        parts.sort_unstable();
        parts.dedup();
        if parts.is_empty() {
            parts = PARTS.to_vec();
        }
        let settings = Settings { directory: self.dir.clone(), image_bytes: self.size << 20 };
        let bar = context.progress("measuring");
        let mut figures: Vec<Figure> = Vec::new();
        for (done, part) in parts.iter().enumerate() {
            bar.set_items(done as u64, parts.len() as u64);
            figures.extend(measure(*part, &settings)?);
        }
        bar.finish();
        let machine = Machine::of_this_process();
        let file_system = file_system_of(&self.dir);
        let document = json!({
            "machine": machine,
            "directory": self.dir.display().to_string(),
            "file_system": file_system,
            "image_bytes": settings.image_bytes,
            "figures": figures,
        });
        context.print(&document, || {
            let rows: Vec<Vec<String>> = figures
                .iter()
                .map(|figure| {
                    vec![figure.name.clone(), number(figure.value), figure.unit.to_owned(), figure.detail.clone()]
                })
                .collect();
            let Machine { epochfs, kernel, processor, processors, vector_unit, memory_bytes, .. } = &machine;
            format!(
                "epochfs {epochfs}, Linux {kernel}, {processors} x {processor} ({vector_unit}), {} MiB, {} on {file_system}\n\n",
                memory_bytes >> 20,
                self.dir.display()
            ) + &table(&["figure", ">value", "unit", "detail"], &rows)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

/// About three digits that matter.
fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        middle if middle >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_as_long_as_they_matter() {
        let shown = [12345.6, 12.345, 1.2345, 0.012345].map(number);
        assert_eq!(shown, ["12346", "12.3", "1.23", "0.012"]);
    }
}
