//! `epochfs ls`

use std::process::ExitCode;

use serde_json::json;

use super::context::Context;
use super::output::{name, name_json, size, table, time};
use crate::epoch::{EpochName, commit_of};
use crate::error::Result;

/// List machines, or an epoch's files.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  epochfs ls\n  epochfs ls web1@latest")]
pub struct Ls {
    /// An epoch; without it the machines are listed.
    #[arg(value_name = "MACHINE[@EPOCH]")]
    epoch: Option<EpochName>,
}

impl Ls {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        match &self.epoch {
            None => list_machines(context)?,
            Some(epoch) => list_files(context, epoch)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn list_machines(context: &Context) -> Result<()> {
    let store = context.open()?;
    let mut rows = Vec::new();
    let mut documents = Vec::new();
    for machine in store.repository().machines()? {
        let head = store.repository().require(&machine)?;
        let latest = store.repository().latest_of(&head)?;
        let logical = latest.as_ref().map(|record| commit_of(record).map(|commit| commit.logical_len)).transpose()?;
        let owner = head.record.owner.as_ref().map(|owner| owner.name.clone());
        rows.push(vec![
            machine.to_string(),
            latest.as_ref().map_or("-".to_owned(), |record| record.seq.to_string()),
            latest.as_ref().map_or("-".to_owned(), |record| time(record.time_ns)),
            logical.map_or("-".to_owned(), size),
            owner.clone().unwrap_or_default(),
        ]);
        documents.push(json!({
            "machine": &*machine,
            "latest_epoch": latest.as_ref().map(|record| record.seq),
            "time_ns": latest.as_ref().map(|record| record.time_ns),
            "logical_bytes": logical,
            "term": head.record.term,
            "owner": owner,
        }));
    }
    context.print(&json!({"machines": documents}), || {
        table(&["machine", ">latest", "time (UTC)", ">length", "owner"], &rows)
    })
}

fn list_files(context: &Context, epoch: &EpochName) -> Result<()> {
    use epochfs_format::EntryKind;
    let epoch = context.open()?.epoch(epoch)?;
    let mut rows = Vec::new();
    let mut documents = Vec::new();
    for entry in epoch.manifest().entries() {
        let (kind, length) = match &entry.kind {
            EntryKind::Stream(image) => ("stream", Some(image.length)),
            EntryKind::Directory => ("directory", None),
            EntryKind::Symlink(_) => ("symlink", None),
        };
        rows.push(vec![
            format!("{:04o}", entry.attributes.mode),
            kind.to_owned(),
            length.map_or(String::new(), size),
            name(&entry.path),
        ]);
        documents.push(json!({
            "name": name_json(&entry.path),
            "kind": kind,
            "mode": entry.attributes.mode,
            "length": length,
        }));
    }
    let document = json!({"machine": &**epoch.machine(), "epoch": epoch.number(), "files": documents});
    context.print(&document, || table(&["mode", "kind", ">length", "name"], &rows))
}
