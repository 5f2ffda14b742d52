//! `epochfs show`

use std::process::ExitCode;

use epochfs_format::hex;
use serde_json::json;

use super::context::Context;
use super::output::{name, name_json, plain, size, table, time};
use crate::epoch::EpochName;
use crate::error::Result;

/// Describe one epoch: its streams, digests, parent and notes.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  epochfs show web1\n  epochfs show web1@before-upgrade --json")]
pub struct Show {
    /// The epoch; the newest where none is named.
    #[arg(value_name = "MACHINE[@EPOCH]")]
    epoch: EpochName,
}

impl Show {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let epoch = context.open()?.epoch(&self.epoch)?;
        let (record, commit) = (epoch.record(), epoch.commit());
        let origin = commit.origin.as_ref().map(|(machine, epoch)| format!("{machine}@{epoch}"));
        let notes: serde_json::Map<String, serde_json::Value> =
            commit.notes.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
        let mut rows = Vec::new();
        let mut streams = Vec::new();
        for (path, image) in epoch.manifest().streams() {
            let digest = hex(&image.digest());
            rows.push(vec![name(path), size(image.length), image.length.to_string(), digest.clone()]);
            streams.push(json!({"name": name_json(path), "length": image.length, "digest": digest}));
        }
        let document = json!({
            "machine": &**epoch.machine(),
            "epoch": epoch.number(),
            "time_ns": record.time_ns,
            "term": record.term,
            "parent": commit.parent,
            "origin": origin,
            "digest": hex(&commit.digest),
            "logical_bytes": commit.logical_len,
            "changed_pages": commit.changed_pages,
            "new_pages": commit.new_pages,
            "stored_bytes": commit.stored_len,
            "packs": commit.packs.iter().map(|(id, len)| json!({"id": hex(id), "bytes": len})).collect::<Vec<_>>(),
            "tags": commit.tags,
            "message": commit.message,
            "notes": notes,
            "streams": streams,
        });
        context.print(&document, || {
            let mut text = format!("{} of {} (UTC)\n", epoch.name(), time(record.time_ns));
            text += &format!("digest   {}\n", hex(&commit.digest));
            text += &match commit.parent {
                0 => "parent   none\n".to_owned(),
                parent => format!("parent   {parent}\n"),
            };
            if let Some(origin) = &origin {
                text += &format!("clone of {origin}\n");
            }
            text += &format!(
                "pages    {} changed, {} new, {} stored\n",
                commit.changed_pages,
                commit.new_pages,
                size(commit.stored_len)
            );
            if !commit.message.is_empty() {
                text += &format!("message  {}\n", plain(&commit.message).replace('\n', "\n         "));
            }
            for (name, value) in &commit.notes {
                text += &format!("note     {}={}\n", plain(name), plain(value).replace('\n', "\n         "));
            }
            text + "\n" + &table(&["stream", ">length", ">bytes", "digest"], &rows)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
