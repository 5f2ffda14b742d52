//! `epochfs log`

use std::process::ExitCode;

use epochfs_format::{Record, hex};
use serde_json::json;

use super::context::Context;
use super::output::{size, table, time};
use crate::epoch::{EpochName, commit_of};
use crate::error::{Error, Result};

/// List a machine's epochs.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  epochfs log web1\n  epochfs log web1 --last 10 --json")]
pub struct Log {
    /// The machine.
    machine: String,
    /// Only the newest so many.
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// Every record of the log: terms, tags and drops too.
    #[arg(long)]
    records: bool,
}

impl Log {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let name: EpochName = self.machine.parse()?;
        if name.which.is_some() {
            return Err(Error::usage(format!("{}: log takes a machine, not an epoch", self.machine))
                .hint(format!("`epochfs show {}` describes one epoch", self.machine)));
        }
        let store = context.open()?;
        let head = store.repository().require(&name.machine)?;
        if self.records {
            return self.print_records(context, &store, head.record.seq);
        }
        let bar = context.progress("reading the log");
        let state = store.repository().state(&head, &mut |done, total| bar.set_items(done, total))?;
        bar.finish();
        let skipped = state.epochs.len().saturating_sub(self.last.unwrap_or(usize::MAX));
        let mut rows = Vec::new();
        let mut documents = Vec::new();
        for record in state.epochs.values().skip(skipped) {
            let commit = commit_of(record)?;
            let tags = state.list.tags_of(record.seq);
            rows.push(vec![
                record.seq.to_string(),
                time(record.time_ns),
                size(commit.logical_len),
                commit.changed_pages.to_string(),
                commit.new_pages.to_string(),
                size(commit.stored_len),
                tags.join(" "),
                first_line(&commit.message),
            ]);
            documents.push(json!({
                "epoch": record.seq,
                "time_ns": record.time_ns,
                "parent": commit.parent,
                "origin": commit.origin.as_ref().map(|(machine, epoch)| format!("{machine}@{epoch}")),
                "digest": hex(&commit.digest),
                "logical_bytes": commit.logical_len,
                "changed_pages": commit.changed_pages,
                "new_pages": commit.new_pages,
                "stored_bytes": commit.stored_len,
                "tags": tags,
                "message": commit.message,
            }));
        }
        let document = json!({"machine": &*name.machine, "epochs": documents});
        context.print(&document, || {
            table(&[">epoch", "time (UTC)", ">length", ">changed", ">new", ">stored", "tags", "message"], &rows)
        })?;
        Ok(ExitCode::SUCCESS)
    }

    fn print_records(&self, context: &Context, store: &crate::epoch::EpochStore, newest: u64) -> Result<ExitCode> {
        let machine: std::sync::Arc<str> = self.machine.as_str().into();
        let first = newest.saturating_sub(self.last.map_or(u64::MAX, |last| last as u64)) + 1;
        let mut rows = Vec::new();
        let mut documents = Vec::new();
        for seq in first..=newest {
            let Some((record, _)) = store.repository().objects().record(&machine, seq)? else {
                return Err(Error::damaged(format!("record {seq} of {machine} is missing")));
            };
            let owner = record.owner.as_ref().map(|owner| owner.name.clone());
            rows.push(vec![
                seq.to_string(),
                time(record.time_ns),
                record.body.name().to_owned(),
                record.term.to_string(),
                owner.clone().unwrap_or_default(),
                detail(&record),
            ]);
            documents.push(json!({
                "record": seq,
                "time_ns": record.time_ns,
                "kind": record.body.name(),
                "term": record.term,
                "owner": owner,
                "latest_epoch": record.latest_epoch,
                "writer": hex(&record.writer),
            }));
        }
        context.print(&json!({"machine": &*machine, "records": documents}), || {
            table(&[">record", "time (UTC)", "kind", ">term", "owner", "detail"], &rows)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().filter(|letter| !letter.is_control()).collect()
}

fn detail(record: &Record) -> String {
    use epochfs_format::Body;
    match &record.body {
        Body::Create | Body::Term | Body::Remove => String::new(),
        Body::Barrier { .. } => format!("of condemnation {}", record.generation),
        Body::Commit(commit) => first_line(&commit.message),
        Body::Tag { epoch, name } => format!("{name} names epoch {epoch}"),
        Body::Untag { name } => name.clone(),
        Body::Drop { epochs } => epochs.iter().map(u64::to_string).collect::<Vec<_>>().join(" "),
    }
}
