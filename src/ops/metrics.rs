//! What `status` knows, as a monitoring system reads it: Prometheus' text format.

use std::fmt::Write;

use super::control::{DaemonStatus, Protected};
use super::servers::ServerStatus;

/// One figure's lines.
struct Metric {
    name: &'static str,
    help: &'static str,
    kind: &'static str,
    lines: String,
}

/// Figures in the order in which they were first told.
#[derive(Default)]
struct Metrics(Vec<Metric>);

impl Metrics {
    fn tell(&mut self, name: &'static str, help: &'static str, labels: &[(&str, &str)], value: f64) {
        let at = self.0.iter().position(|metric| metric.name == name).unwrap_or_else(|| {
            let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
            self.0.push(Metric { name, help, kind, lines: String::new() });
            self.0.len() - 1
        });
        let labels: Vec<String> =
            labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escaped(value))).collect();
        // A string takes whatever is written to it.
        let _ = writeln!(self.0[at].lines, "epochfs_{name}{{{}}} {value}", labels.join(","));
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}

/// The text of everything.
pub fn exposition(daemons: &[DaemonStatus], servers: &[ServerStatus], dead_mounts: usize) -> String {
    let mut metrics = Metrics::default();
    metrics.tell("dead_mounts", "Mounts whose daemon died.", &[], dead_mounts as f64);
    for daemon in daemons {
        tell_daemon(&mut metrics, daemon);
    }
    for server in servers {
        let labels =
            [("repository", server.repository.as_str()), ("machine", &server.machine), ("socket", &server.socket)];
        metrics.tell("page_fault_server_vms", "VMs that a page-fault server serves.", &labels, server.vms as f64);
    }
    let mut text = String::new();
    for Metric { name, help, kind, lines } in metrics.0 {
        let _ = write!(text, "# HELP epochfs_{name} {help}\n# TYPE epochfs_{name} {kind}\n{lines}");
    }
    text
}

fn tell_daemon(metrics: &mut Metrics, daemon: &DaemonStatus) {
    let repository = ("repository", daemon.who.repository.as_str());
    let (mount, filesystem) = ([repository, ("mountpoint", daemon.who.mountpoint.as_str())], &daemon.filesystem);
    let mut tell = |name, help, value| metrics.tell(name, help, &mount, value);
    tell("mounted", "Whether the mount is reached by its path.", flag(daemon.who.state == "mounted"));
    tell("read_bytes_total", "Bytes read through the mount.", filesystem.read_bytes as f64);
    tell("written_bytes_total", "Bytes written through the mount.", filesystem.written_bytes as f64);
    tell("open_files", "Files that are open on the mount.", filesystem.open_files as f64);
    tell("cached_bytes", "What the daemon keeps of trees and objects.", filesystem.cached_bytes as f64);
    tell("waiting_bytes", "Written-back pages for which the spool has no room.", filesystem.waiting_bytes as f64);
    let store = &filesystem.store;
    tell("store_read_bytes_total", "Bytes read from the repository's store.", store.read_bytes as f64);
    tell("store_written_bytes_total", "Bytes written to the repository's store.", store.written_bytes as f64);
    tell("store_reachable", "Whether the store answers.", flag(store.unreachable_since_ns.is_none()));
    if let Some(requests) = &store.requests {
        tell(
            "store_failed_requests_total",
            "Requests that failed, the repeated ones included.",
            requests.failures as f64,
        );
    }
    if let Some(cache) = &store.cache {
        tell("store_cache_hit_bytes_total", "Bytes that the cache on disk had.", cache.hit_bytes as f64);
        tell("store_cache_missed_bytes_total", "Bytes that it had not.", cache.missed_bytes as f64);
    }
    for machine in &filesystem.machines {
        let labels = [repository, ("machine", machine.machine.as_str())];
        let mut tell = |name, help, value| metrics.tell(name, help, &labels, value);
        tell("machine_base_epoch", "The epoch that a machine's live lies on.", machine.base as f64);
        tell("machine_dirty_bytes", "Written and in no epoch.", machine.dirty_bytes as f64);
        tell("machine_spool_bytes", "What that takes on this host's disk.", machine.spool_bytes as f64);
        tell("machine_commits_in_flight", "Commits that are not durable yet.", machine.commits_in_flight as f64);
        let takes_changes = matches!(machine.state.as_str(), "clean" | "dirty");
        tell("machine_takes_changes", "Whether live can be written to.", flag(takes_changes));
    }
    for protected in &daemon.protected {
        tell_protected(metrics, repository, protected);
    }
}

fn tell_protected(metrics: &mut Metrics, repository: (&str, &str), protected: &Protected) {
    let Protected { status, said_ms_ago } = protected;
    let labels = [repository, ("machine", status.machine.as_str())];
    let state = [labels[0], labels[1], ("state", status.state.as_str())];
    metrics.tell("protected_state", "How a machine's protection is; 1 for the state that it is in.", &state, 1.0);
    if let Some(limit) = status.limit.and_then(|limit| serde_json::to_value(limit).ok()) {
        let limit = [labels[0], labels[1], ("limit", limit.as_str().unwrap_or_default())];
        metrics.tell("protected_limit", "What sets the interval; 1 for what does.", &limit, 1.0);
    }
    let mut tell = |name, help, value| metrics.tell(name, help, &labels, value);
    tell("protected_said_seconds_ago", "How long ago the agent spoke.", said_ms_ago / 1000.0);
    if let Some(age) = status.age_ms {
        tell("protected_age_seconds", "How old the state is that would be restored.", (age + said_ms_ago) / 1000.0);
    }
    if let Some(epoch) = status.newest_epoch {
        tell("protected_newest_epoch", "The newest durable epoch.", epoch as f64);
    }
    if let Some(meets) = status.meets_rpo {
        tell("protected_meets_target", "Whether no more work would be lost than may be.", flag(meets));
    }
    tell("protected_target_misses_total", "How often more would have been lost.", status.rpo_misses as f64);
    tell("protected_interval_seconds", "The interval between epochs.", status.interval_ms / 1000.0);
    tell("protected_pause_seconds", "How long the machine stood still for the last epoch.", status.pause_ms / 1000.0);
    tell("protected_pause_p99_seconds", "The longest but one in a hundred.", status.pause_p99_ms / 1000.0);
    tell("protected_durable_seconds", "Until the last epoch was durable.", status.durable_ms / 1000.0);
    tell("protected_overhead_ratio", "The share of its time that protection cost it.", status.overhead);
    tell("protected_changed_pages", "Pages that differ in the last epoch.", status.changed_pages as f64);
    tell("protected_stored_bytes", "Bytes stored for the last epoch.", status.stored_bytes as f64);
    tell("protected_epochs_total", "Epochs made.", status.epochs as f64);
    tell("protected_failures_total", "Checkpoints that failed.", status.failures as f64);
    tell("protected_host_load", "Threads that want to run, for each processor.", status.host_load);
    tell("protected_disks_elsewhere", "Disks that it writes to and no epoch holds.", status.elsewhere.len() as f64);
    if let Some(age) = status.beat_age_ms {
        let age = (age + said_ms_ago) / 1000.0;
        tell("protected_heartbeat_age_seconds", "How long ago the guest gave a sign of life.", age);
    }
    if let Some(room) = status.room_bytes {
        tell("protected_room_bytes", "Bytes that commits may still take in the store.", room as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_each_figure_is_explained_once() {
        let server = |machine: &str| ServerStatus {
            repository: "/srv/a \"b\"\\c\n".into(),
            machine: machine.into(),
            epoch: 17,
            stream: "memory".into(),
            socket: "/run/web1".into(),
            pid: 1,
            worker: 2,
            vms: 3,
            started_ns: 0,
            log: None,
        };
        let text = exposition(&[], &[server("web1"), server("web2")], 1);
        let expected = "# HELP epochfs_dead_mounts Mounts whose daemon died.\n# TYPE epochfs_dead_mounts gauge\n\
            epochfs_dead_mounts{} 1\n\
            # HELP epochfs_page_fault_server_vms VMs that a page-fault server serves.\n\
            # TYPE epochfs_page_fault_server_vms gauge\n\
            epochfs_page_fault_server_vms{repository=\"/srv/a \\\"b\\\"\\\\c\\n\",machine=\"web1\",socket=\"/run/web1\"} 3\n\
            epochfs_page_fault_server_vms{repository=\"/srv/a \\\"b\\\"\\\\c\\n\",machine=\"web2\",socket=\"/run/web1\"} 3\n";
        assert_eq!(text, expected);
    }
}
