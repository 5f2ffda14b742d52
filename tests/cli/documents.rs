//! What `--json` prints: one document, with fields that scripts may rely on.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;

use serde_json::Value;

use crate::monitor::Monitor;
use crate::support::{Mountpoint, World, can_mount_or_skip, finish, kill, pages, stream};

/// Fails unless the document has these fields; `a.b` is b in a, `a[].b` is b in each element of a, which is not empty.
#[track_caller]
fn has(document: &Value, fields: &[&str]) {
    for field in fields {
        look(document, field, field, document);
    }
}

#[track_caller]
fn look(value: &Value, path: &str, field: &str, document: &Value) {
    let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
    let name = first.trim_end_matches("[]");
    let found = value.get(name).unwrap_or_else(|| panic!("no {field} in {document:#}"));
    let elements = match first.ends_with("[]") {
        true => found.as_array().unwrap_or_else(|| panic!("{field} is no list in {document:#}")).clone(),
        false => vec![found.clone()],
    };
    assert!(!elements.is_empty(), "{field} is empty in {document:#}");
    if let Some(rest) = rest {
        elements.iter().for_each(|element| look(element, rest, field, document));
    }
}

#[test]
fn every_command_prints_a_document_with_its_fields() {
    let world = World::empty();
    let mut seen = BTreeSet::new();
    let mut check = |words: &[&str], fields: &[&str]| {
        seen.insert(words[0].to_owned());
        let document = world.json(words);
        has(&document, fields);
        document
    };
    let file = world.file("a", pages(1, 20));
    let memory = stream("memory", &file).into_string().unwrap();
    check(&["init"], &["repository", "id", "encrypted"]);
    let place = |name: &str| world.path(name).into_os_string().into_string().unwrap();
    let (key, spare, next, sealed) = (place("key"), place("spare"), place("next"), place("sealed"));
    for file in [&key, &spare, &next] {
        check(&["key", "generate", file], &["file"]);
    }
    check(&["key", "generate"], &["key"]);
    let mut on_sealed = |words: &[&str], fields: &[&str]| {
        check(&[words, &["--repo", &sealed, "--key-file", &key, "--key-file", &spare]].concat(), fields)
    };
    on_sealed(&["init", "--encrypt"], &["repository", "id", "encrypted"]);
    on_sealed(&["key", "add", &spare], &["repository", "added"]);
    let of_keys = ["repository", "keys[].id", "keys[].created_ns", "keys[].damaged", "keys[].given"];
    let listed = on_sealed(&["key", "list"], &of_keys);
    on_sealed(&["key", "remove", listed["keys"][0]["id"].as_str().unwrap()], &["repository", "removed"]);
    on_sealed(&["key", "rotate", &next], &["repository", "added", "removed[]"]);
    check(&["hosts"], &["hosts"]);
    let committed = [
        "machine",
        "epoch",
        "parent",
        "digest",
        "read_bytes",
        "changed_pages",
        "new_pages",
        "deduplicated_pages",
        "stored_bytes",
        "index_lookups",
        "index_hits",
        "elapsed_ms",
    ];
    check(&["commit", "web1", &memory, "--tag", "first", "--note", "a=b", "-m", "text"], &committed);
    std::fs::write(&file, pages(2, 20)).unwrap();
    check(&["commit", "web1", &memory], &committed);
    check(
        &["log", "web1"],
        &[
            "machine",
            "epochs[].epoch",
            "epochs[].time_ns",
            "epochs[].parent",
            "epochs[].origin",
            "epochs[].digest",
            "epochs[].logical_bytes",
            "epochs[].changed_pages",
            "epochs[].new_pages",
            "epochs[].stored_bytes",
            "epochs[].tags",
            "epochs[].message",
        ],
    );
    check(
        &["log", "web1", "--records"],
        &[
            "machine",
            "records[].record",
            "records[].time_ns",
            "records[].kind",
            "records[].term",
            "records[].owner",
            "records[].latest_epoch",
            "records[].writer",
        ],
    );
    check(
        &["ls"],
        &[
            "machines[].machine",
            "machines[].latest_epoch",
            "machines[].time_ns",
            "machines[].logical_bytes",
            "machines[].term",
            "machines[].owner",
        ],
    );
    check(&["ls", "web1"], &["machine", "epoch", "files[].name", "files[].kind", "files[].mode", "files[].length"]);
    let shown = check(
        &["show", "web1@first"],
        &[
            "machine",
            "epoch",
            "time_ns",
            "term",
            "parent",
            "origin",
            "digest",
            "logical_bytes",
            "changed_pages",
            "new_pages",
            "stored_bytes",
            "packs",
            "tags[]",
            "message",
            "notes.a",
            "streams[].name",
            "streams[].length",
            "streams[].digest",
        ],
    );
    assert_eq!((&shown["message"], &shown["notes"]["a"]), (&"text".into(), &"b".into()));
    check(
        &["diff", "web1"],
        &[
            "before",
            "after",
            "files[].name",
            "files[].change",
            "files[].changed_pages",
            "files[].changed_bytes",
            "files[].before_bytes",
            "files[].after_bytes",
            "files[].ranges[]",
        ],
    );
    let target = world.path("out").into_os_string().into_string().unwrap();
    check(
        &["export", "web1", "--output", &target],
        &["machine", "epoch", "directory", "files", "logical_bytes", "written_bytes", "elapsed_ms"],
    );
    check(&["clone", "web1", "web2"], &["machine", "epoch", "origin"]);
    let other = world.path("other").into_os_string().into_string().unwrap();
    world.ok(["init", "--repo", &other]);
    check(
        &["copy", "web1", "--to", &other],
        &[
            "machine",
            "to",
            "to_machine",
            "epochs[].from",
            "epochs[].to",
            "epochs[].read_bytes",
            "epochs[].new_pages",
            "epochs[].stored_bytes",
            "there_before",
            "passed_over",
        ],
    );
    check(&["tag", "web1", "golden"], &["machine", "epoch", "tag"]);
    check(&["tag", "web1", "golden", "--delete"], &["machine", "tag", "deleted"]);
    check(
        &["prune", "web1", "--keep-last", "9"],
        &[
            "machines[].machine",
            "machines[].epochs[].epoch",
            "machines[].epochs[].time_ns",
            "machines[].epochs[].kept",
            "machines[].epochs[].reasons[]",
            "kept",
            "dropped",
            "done",
        ],
    );
    check(
        &["gc", "plan"],
        &[
            "packs",
            "bytes",
            "garbage_packs",
            "garbage_records",
            "garbage_bytes",
            "young_packs",
            "young_bytes",
            "machines",
            "epochs",
            "epochs_walked",
            "pages_walked",
            "done",
        ],
    );
    check(
        &["gc", "run", "--yes"],
        &["condemned", "kept", "deleted", "emptied", "deleted_bytes", "done", "waiting_for"],
    );
    check(&["gc", "status"], &["record", "step", "time_ns", "running", "readers"]);
    check(
        &["gc", "compact", "web1"],
        &[
            "machines[].machine",
            "machines[].epoch",
            "machines[].objects",
            "machines[].bytes",
            "machines[].moved_objects",
            "machines[].moved_bytes",
            "machines[].epochs_walked",
            "machines[].done",
            "machines[].new_epoch",
            "machines[].stored_bytes",
        ],
    );
    check(&["rm", "web1@1", "--yes"], &["machines", "epochs[].machine", "epochs[].epoch", "done"]);
    check(
        &["verify"],
        &[
            "objects",
            "bytes",
            "pages",
            "machines",
            "epochs",
            "problems",
            "broken_epochs",
            "unknown_objects",
            "resumed_at_bytes",
            "whole",
        ],
    );
    check(
        &["repair"],
        &[
            "found",
            "is_applied",
            "repaired_objects",
            "repaired_blocks",
            "lost",
            "quarantined_blocks",
            "left",
            "left.problems",
            "whole",
        ],
    );
    check(
        &["stats"],
        &[
            "machines",
            "epochs",
            "streams",
            "logical_bytes",
            "filled_bytes",
            "unique_bytes",
            "page_block_bytes",
            "node_block_bytes",
            "stored_bytes",
            "objects",
            "dedup_ratio",
            "compression_ratio",
            "total_ratio",
        ],
    );
    check(
        &["stats", "--freed"],
        &[
            "machines[].machine",
            "machines[].needed_bytes",
            "machines[].freed_bytes",
            "machines[].epochs",
            "pack_bytes",
            "shared_bytes",
        ],
    );
    check(
        &["failover", "simulate", "--hosts", "20", "--machines", "200", "--hosts-per-rack", "2"],
        &[
            "scenario.hosts",
            "lost_hosts",
            "lost_machines",
            "placed",
            "unplaced",
            "planning_s",
            "recoveries[].strategy",
            "recoveries[].to_50_percent_s",
            "recoveries[].to_99_percent_s",
            "recoveries[].to_100_percent_s",
            "recoveries[].times_as_fast",
        ],
    );
    let cluster = world.file(
        "cluster.json",
        r#"{"hosts": [{"id": "h1", "memory": 9, "memory_free": 9, "cpus": 1}],
            "needs": [{"machine": "a", "epoch": 1, "memory": 1, "cpus": 1}, {"machine": "b", "epoch": 1, "memory": 99, "cpus": 1}]}"#,
    );
    check(
        &["failover", "plan", "--from", cluster.to_str().unwrap()],
        &[
            "placements[].machine",
            "placements[].epoch",
            "placements[].host",
            "placements[].wave",
            "unplaced[].machine",
            "unplaced[].reason",
            "unplaced[].why.kind",
            "unplaced[].refusals",
            "is_proven",
        ],
    );
    check(&["completions", "bash"], &["shell", "script"]);
    check(&["man"], &["page"]);
    let pages = world.path("man").into_os_string().into_string().unwrap();
    check(&["man", "--output", &pages], &["directory", "files[]"]);
    check(
        &["bench", "epochs", "--size", "8"],
        &[
            "machine.processor",
            "machine.processors",
            "machine.kernel",
            "machine.memory_bytes",
            "directory",
            "file_system",
            "image_bytes",
            "figures[].name",
            "figures[].value",
            "figures[].unit",
            "figures[].detail",
        ],
    );
    let mountpoint = Mountpoint::new(&world, "mount");
    let can_mount = can_mount_or_skip("the documents of mount and umount");
    if can_mount {
        check(
            &["mount", "--background", mountpoint.text()],
            &[
                "repository",
                "id",
                "mountpoint",
                "pid",
                "socket",
                "log",
                "kernel[].name",
                "kernel[].wanted",
                "kernel[].found",
            ],
        );
        check(
            &["status"],
            &[
                "dead_mounts",
                "page_fault_servers",
                "daemons[].repository",
                "daemons[].id",
                "daemons[].mountpoint",
                "daemons[].pid",
                "daemons[].epochfs",
                "daemons[].started_ns",
                "daemons[].state",
                "daemons[].read_only",
                "daemons[].allow_other",
                "daemons[].threads",
                "daemons[].spool_bytes_max",
                "daemons[].socket",
                "daemons[].log",
                "daemons[].io_flusher",
                "daemons[].kernel[].name",
                "daemons[].kernel[].wanted",
                "daemons[].kernel[].found",
                "daemons[].kernel[].refused",
                "daemons[].machines",
                "daemons[].inodes",
                "daemons[].open_files",
                "daemons[].read_bytes",
                "daemons[].written_bytes",
                "daemons[].store.requests",
                "daemons[].store.read_bytes",
                "daemons[].store.written_bytes",
                "daemons[].store.unreachable_since_ns",
                "daemons[].store.last_failure",
                "daemons[].store.cache",
            ],
        );
        // What a restore tells of its moments is checked where one is made.
        check(
            &["restore", "web2", "--vmm", "firecracker", "--state", "memory", "--print"],
            &["requests[].method", "requests[].path", "requests[].body"],
        );
        let socket = world.path("firecracker.socket");
        let _monitor = Monitor::start(&socket);
        // The machine's files are on the mount from its creation on.
        std::fs::create_dir(Path::new(mountpoint.text()).join("protected")).unwrap();
        check(
            &["protect", "protected", "--firecracker", socket.to_str().unwrap(), "--once"],
            &[
                "machine",
                "state",
                "why",
                "newest_epoch",
                "age_ms",
                "rpo_ms",
                "meets_rpo",
                "rpo_misses",
                "interval_ms",
                "limit",
                "reason",
                "epochs",
                "failures",
                "pause_ms",
                "pause_parts_ms[]",
                "prepared_ms",
                "durable_ms",
                "changed_pages",
                "stored_bytes",
                "pause_mean_ms",
                "pause_p50_ms",
                "pause_p99_ms",
                "overhead",
            ],
        );
        let text = world.ok(["status", "--metrics"]).stdout;
        assert!(text.contains("\nepochfs_mounted{") && text.contains("epochfs_dead_mounts{} 0\n"), "{text}");
        for line in text.lines().filter(|line| !line.starts_with("# ")) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("epochfs_") && name.ends_with('}') && value.parse::<f64>().is_ok(), "{line}");
        }
        world.run(["status", "--metrics", "--json"]).code(2).says("do not go together");
        check(&["umount", mountpoint.text()], &["mountpoint", "repository", "ended", "holders", "uncommitted"]);
    }
    check(&["status"], &["daemons", "dead_mounts", "page_fault_servers"]);
    // What a host lacks makes doctor fail, and is no fault of the document.
    seen.insert("doctor".to_owned());
    has(
        &world.run(["doctor", "--json"]).json(),
        &[
            "healthy",
            "ok",
            "warnings",
            "failures",
            "skipped",
            "checks[].name",
            "checks[].status",
            "checks[].found",
            "checks[].next_step",
        ],
    );
    // A directory has no cache to warm: its document is checked where there is a bucket.
    seen.insert("warm".to_owned());
    assert_eq!(world.run(["warm", "web1"]).code, 2);
    // It serves until it is told to stop; its document comes first.
    let socket = world.path("uffd.socket");
    let mut server =
        world.start(["--json", "serve-uffd", "web1", "--stream", "memory", "--socket", socket.to_str().unwrap()]);
    let mut document = Vec::new();
    let mut stdout = server.stdout.take().unwrap();
    while serde_json::from_slice::<Value>(&document).is_err() {
        let mut byte = [0];
        assert_eq!(std::io::Read::read(&mut stdout, &mut byte).unwrap(), 1, "it ended before it served");
        document.push(byte[0]);
    }
    kill(server.id(), rustix::process::Signal::TERM);
    finish(server).code(0);
    seen.insert("serve-uffd".to_owned());
    has(
        &serde_json::from_slice(&document).unwrap(),
        &["machine", "epoch", "stream", "bytes", "socket", "pid", "worker", "log"],
    );
    seen.insert("run".to_owned());
    // Where there is no KVM, its own tests say so.
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok() {
        let words = ["run", "--memory", "4M", "--protect", "guest1", "--interval", "20ms", "--time", "100ms"];
        let fields = [
            "machine",
            "ended",
            "ready_ms",
            "elapsed_ms",
            "counts",
            "counts_here",
            "spins_here",
            "conflicts",
            "waits",
            "pages_brought",
            "epochs",
            "failed",
            "last_epoch",
            "pages",
            "changed_pages",
            "stored_bytes",
            "pause_p50_us",
            "pause_p99_us",
            "pause_max_us",
            "missed",
            "wrong",
        ];
        has(&world.json(words), &fields);
    }
    if !can_mount {
        seen.extend(["mount", "restore", "umount"].map(str::to_owned));
    }
    // Whoever adds a command adds its document here.
    let all: BTreeSet<String> =
        epochfs::cli::command().get_subcommands().map(|command| command.get_name().to_owned()).collect();
    assert_eq!(seen, all, "commands whose documents are checked, and commands that there are");
}

#[test]
fn an_error_is_a_document_too() {
    let world = World::new();
    let fields = ["error.kind", "error.message", "error.next_step", "error.exit_code"];
    for (words, code, kind) in [
        (&["show", "web1"][..], 5, "not_found"),
        (&["tag", "web1", "17"], 5, "not_found"),
        (&["init"], 4, "conflict"),
        (&["commit", "web1"], 5, "not_found"),
        (&["commit", "web1", "--threads", "2"], 2, "usage"),
        (&["umount", "/"], 5, "not_found"),
    ] {
        let mut command = world.command(words);
        command.arg("--json");
        let ran = crate::support::run(command);
        ran.code(code).says("epochfs: ");
        has(&ran.json(), &fields);
        assert_eq!(ran.json()["error"]["kind"], kind);
        assert_eq!(ran.json()["error"]["exit_code"], code);
    }
}

#[test]
fn data_goes_to_stdout_and_notices_do_not() {
    let world = World::new();
    let memory = stream("memory", &world.file("a", pages(1, 3)));
    let ran = world.ok([OsStr::new("commit"), OsStr::new("web1"), &memory]);
    assert!(ran.stdout.starts_with("committed web1@1") && ran.stderr.is_empty(), "{ran:?}");
    let ran = world.ok(["rm", "web1", "--quiet"]);
    assert!(ran.stderr.is_empty(), "{ran:?}");
    for words in [&["ls"][..], &["log", "web1"], &["show", "web1"], &["doctor"]] {
        let ran = world.run(words);
        assert!(!ran.stdout.contains('\u{1b}'), "colours are for terminals: {ran:?}");
    }
}
