//! `epochfs man`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::context::Context;
use crate::error::{Error, Result};

/// Print the manual page, or write one page for each command to a directory.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs man | man -l -\n  epochfs man --output /usr/local/share/man/man1 (epochfs.1, epochfs-commit.1, ...)"
)]
pub struct Man {
    /// The directory to write to, which is made if it is missing. Pages that are there are replaced.
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,
}

impl Man {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        match &self.output {
            None => {
                let page = render(super::command().disable_help_subcommand(true))?;
                context.print(&json!({"page": page}), || page.clone())?;
            }
            Some(directory) => {
                let files = write_pages(directory)?;
                let document = json!({"directory": directory.display().to_string(), "files": files});
                context
                    .print(&document, || format!("wrote {} manual pages to {}\n", files.len(), directory.display()))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn render(command: clap::Command) -> Result<String> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command)
        .source(concat!("epochfs ", env!("CARGO_PKG_VERSION")))
        .render(&mut page)
        .map_err(|error| Error::io("cannot render the manual page", error))?;
    Ok(with_examples(&String::from_utf8_lossy(&page)))
}

/// What follows the options in a command's help are its examples. The generator calls them something else, and would
/// have the lines filled like prose.
fn with_examples(page: &str) -> String {
    const HEADING: &str = ".SH EXTRA\n";
    let Some((before, rest)) = page.split_once(HEADING) else { return page.to_owned() };
    let (examples, after) = match rest.find("\n.SH ") {
        Some(end) => rest.split_at(end + 1),
        None => (rest, ""),
    };
    let lines = examples.strip_prefix("Examples:\n").or_else(|| examples.strip_prefix("Example:\n"));
    format!("{before}.SH EXAMPLES\n.nf\n{}.fi\n{after}", lines.unwrap_or(examples))
}

fn write_pages(directory: &Path) -> Result<Vec<String>> {
    std::fs::create_dir_all(directory)
        .map_err(|error| Error::io(format!("cannot create the directory {}", directory.display()), error))?;
    let mut root = super::command().disable_help_subcommand(true);
    // Fills in the options that every command takes, and the names under which the pages refer to each other.
    root.build();
    let mut files = Vec::new();
    write_page_of(&root, directory, &mut files)?;
    Ok(files)
}

/// Writes the page of a command, then those of the commands under it.
fn write_page_of(command: &clap::Command, directory: &Path, files: &mut Vec<String>) -> Result<()> {
    let file = clap_mangen::Man::new(command.clone()).get_filename();
    let path = directory.join(&file);
    std::fs::write(&path, render(command.clone())?)
        .map_err(|error| Error::io(format!("cannot write {}", path.display()), error))?;
    files.push(file);
    command
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .try_for_each(|command| write_page_of(command, directory, files))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_keep_their_lines() {
        let page = ".SH A\ntext\n.SH EXTRA\nExample:\n  epochfs ls\n.SH VERSION\nv1\n";
        let expected = ".SH A\ntext\n.SH EXAMPLES\n.nf\n  epochfs ls\n.fi\n.SH VERSION\nv1\n";
        assert_eq!(with_examples(page), expected);
        assert_eq!(with_examples(".SH A\n"), ".SH A\n");
    }
}
