//! `epochfs gc` and `epochfs prune`, as processes.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use epochfs::platform::random::Seeded;
use serde_json::Value;

use crate::support::{Mountpoint, World, can_mount_or_skip, pages, stream};

/// Three epochs, of which no two share a page.
fn three_epochs(world: &World) {
    for seed in 1..=3 {
        let file = world.file("memory", pages(seed, 200));
        world.commit("web1", &file);
    }
}

fn packs(world: &World) -> usize {
    world
        .snapshot()
        .keys()
        .filter(|name| name.to_str().unwrap().contains("packs/"))
        .filter(|name| !name.is_dir())
        .count()
}

fn number(document: &Value, field: &str) -> u64 {
    document[field].as_u64().unwrap_or_else(|| panic!("no {field} in {document:#}"))
}

#[test]
fn what_was_dropped_is_given_back_and_the_rest_stays() {
    let world = World::new();
    three_epochs(&world);
    let before = world.json(["stats"]);
    assert_eq!(number(&world.json(["gc", "plan"]), "garbage_packs"), 0);
    world.ok(["rm", "web1@1", "web1@2", "--yes"]);
    let plan = world.json(["gc", "plan"]);
    assert_eq!((number(&plan, "garbage_packs"), number(&plan, "young_packs")), (2, 0));
    // Only the plan.
    let ran = world.json(["gc", "run"]);
    assert_eq!(ran["done"], false);
    assert_eq!(number(&world.json(["gc", "plan"]), "garbage_packs"), 2);
    let ran = world.json(["gc", "run", "--yes"]);
    assert_eq!((number(&ran, "deleted"), number(&ran, "kept")), (2, 0));
    assert_eq!(number(&ran, "deleted_bytes"), number(&plan, "garbage_bytes"));
    let after = world.json(["stats"]);
    assert!(number(&after, "stored_bytes") < number(&before, "stored_bytes") / 2);
    assert_eq!(world.json(["verify"])["whole"], true);
    let status = world.json(["gc", "status"]);
    assert_eq!((status["step"].as_str(), status["running"].as_bool()), (Some("done"), Some(false)));
    // The next commits stand behind the barrier, and what was collected is stored anew.
    let file = world.file("memory", pages(1, 200));
    let committed = world.commit("web2", &file);
    assert_eq!(number(&committed, "new_pages"), 200);
    let file = world.file("memory", pages(3, 200));
    let committed = world.commit("web3", &file);
    assert_eq!(number(&committed, "new_pages"), 0);
    assert_eq!(world.json(["verify"])["whole"], true);
}

#[test]
fn a_second_run_walks_only_what_changed() {
    let world = World::new();
    three_epochs(&world);
    assert_eq!(number(&world.json(["gc", "plan"]), "epochs_walked"), 3);
    assert_eq!(number(&world.json(["gc", "plan"]), "epochs_walked"), 0);
    let file = world.file("memory", pages(4, 200));
    world.commit("web1", &file);
    assert_eq!(number(&world.json(["gc", "plan"]), "epochs_walked"), 1);
    // The third is compared with the first now.
    world.ok(["rm", "web1@2", "--yes"]);
    let plan = world.json(["gc", "plan"]);
    assert_eq!((number(&plan, "epochs_walked"), number(&plan, "garbage_packs")), (1, 1));
}

#[test]
fn clones_keep_what_their_source_gave_up() {
    let world = World::new();
    three_epochs(&world);
    world.ok(["clone", "web1@1", "copy"]);
    world.ok(["rm", "web1", "--yes"]);
    let ran = world.json(["gc", "run", "--yes"]);
    assert_eq!(number(&ran, "deleted"), 2);
    assert_eq!(packs(&world), 1);
    assert_eq!(world.json(["verify"])["whole"], true);
    world.ok(["rm", "copy", "--yes"]);
    assert_eq!(number(&world.json(["gc", "run", "--yes"]), "deleted"), 1);
    assert_eq!(packs(&world), 0);
}

#[test]
fn a_policy_says_what_stays_and_why() {
    let world = World::new();
    three_epochs(&world);
    world.ok(["tag", "web1@1", "golden"]);
    world.run(["prune", "web1"]).code(2);
    let plan = world.json(["prune", "web1", "--keep-last", "1"]);
    assert_eq!((number(&plan, "kept"), number(&plan, "dropped")), (2, 1));
    assert_eq!(plan["done"], false);
    let reasons: Vec<&Value> =
        plan["machines"][0]["epochs"].as_array().unwrap().iter().map(|one| &one["reasons"]).collect();
    assert_eq!(
        reasons,
        [&serde_json::json!(["newest", "last 1"]), &serde_json::json!([]), &serde_json::json!(["tag golden"])]
    );
    let ran = world.ok(["prune", "--keep-yearly", "1", "--yes"]);
    assert!(ran.stdout.contains("goes") && ran.stdout.contains("tag golden"), "{}", ran.stdout);
    let mut left = world.epochs("web1");
    left.sort_unstable();
    assert_eq!(left, [1, 3]);
}

#[test]
fn policies_come_from_a_file_where_none_is_given() {
    let world = World::new();
    three_epochs(&world);
    world.ok(["clone", "web1@1", "db"]);
    world.ok(["clone", "web1@1", "other"]);
    let file = |text: &str| world.file("protect.toml", text).display().to_string();
    let both = file("[keep]\nlast = 2\n[machines.web1]\nqmp = \"/run/x\"\nkeep = { yearly = 1 }\n");
    let plan = world.json(["prune", "--config", &both]);
    assert_eq!((number(&plan, "kept"), number(&plan, "dropped"), &plan["done"]), (3, 2, &Value::Bool(false)));
    assert_eq!(world.epochs("web1").len(), 3, "without --yes nothing is done");
    assert!(plan["without_rules"].as_array().unwrap().is_empty());
    // Rules of one machine say nothing about others.
    let one = file("[machines.web1]\nqmp = \"/run/x\"\nkeep = { last = 2 }\n");
    let ran = world.run(["prune", "--config", &one, "--yes", "--json"]);
    ran.code(0).says("no rule is for db, other");
    assert_eq!(ran.json()["without_rules"], serde_json::json!(["db", "other"]));
    let mut left = world.epochs("web1");
    left.sort_unstable();
    assert_eq!(left, [2, 3]);
    assert_eq!((world.epochs("db").len(), world.epochs("other").len()), (1, 1));
    // What is wrong with the file, or with the arguments, drops nothing.
    for (text, part) in [("[keep]", "no rule"), ("[kept]\nlast = 1", "kept"), ("[keep]\nwithin = \"x\"", "within")] {
        world.run(["prune", "--config", &file(text), "--yes"]).code(2).says(part);
    }
    world.run(["prune", "--config", &one, "--keep-last", "1", "--yes"]).code(2).says("--config");
    world.run(["prune", "--config", world.path("missing").to_str().unwrap(), "--yes"]).code(5).says("missing");
    assert_eq!(world.epochs("web1").len(), 2);
}

#[test]
fn stats_say_what_would_be_given_back() {
    let world = World::new();
    three_epochs(&world);
    world.ok(["clone", "web1@1", "copy"]);
    let freed = world.json(["stats", "--freed"]);
    let of = |machine: &str| {
        let all = freed["machines"].as_array().unwrap();
        all.iter().find(|share| share["machine"] == machine).unwrap().clone()
    };
    assert_eq!((number(&of("copy"), "freed_bytes"), of("copy")["epochs"].as_array().unwrap().len()), (0, 1));
    assert!(number(&of("copy"), "needed_bytes") > 0);
    assert_eq!(number(&freed, "shared_bytes"), number(&of("copy"), "needed_bytes"));
    let second = number(&of("web1")["epochs"][1], "freed_bytes");
    let words = world.ok(["stats", "--freed", "web1"]);
    assert!(words.stdout.contains("web1@2") && !words.stdout.contains("copy"), "{}", words.stdout);
    world.run(["stats", "--freed", "nobody"]).code(5).says("nobody");
    world.ok(["rm", "web1@2", "--yes"]);
    let run = world.json(["gc", "run", "--yes"]);
    assert_eq!(number(&run, "deleted_bytes"), second);
    assert!(second > 0);
}

/// Collectors and commits are killed at random; what was acknowledged is whole, and in the end nothing is left over.
#[test]
fn p4_processes_that_are_killed_lose_nothing_and_leave_nothing() {
    let world = World::new();
    let mut random = Seeded::new(4);
    let mut acknowledged: Vec<(u64, u64)> = Vec::new();
    let rounds = if std::env::var_os("EPOCHFS_LONG").is_some() { 200 } else { 25 };
    for round in 0..rounds {
        let file = world.file("memory", pages(random.below(6), 150));
        let mut commit = world.start(["commit".as_ref(), "web1".as_ref(), stream("memory", &file).as_os_str()]);
        let mut collectors: Vec<_> =
            (0..2).map(|_| world.start(["gc", "run", "--yes", "--no-wait", "--orphans-after", "0s"])).collect();
        std::thread::sleep(std::time::Duration::from_millis(random.below(60)));
        for child in collectors.iter_mut().chain([&mut commit]) {
            if random.chance(500) {
                child.kill().unwrap();
            }
        }
        for mut child in collectors {
            let status = child.wait().unwrap();
            // Killed, done, or overtaken by the other.
            assert!(status.code().is_none_or(|code| code == 0 || code == 4), "round {round}: {status:?}");
        }
        commit.wait().unwrap();
        for epoch in world.epochs("web1") {
            if !acknowledged.iter().any(|(known, _)| *known == epoch) {
                let memory = world.memory(&format!("web1@{epoch}"));
                acknowledged.push((epoch, u64::from(checksum(&memory))));
            }
        }
        // Most epochs go again.
        if acknowledged.len() > 3 {
            let (epoch, _) = acknowledged.remove(random.below(3) as usize);
            world.ok(["rm", &format!("web1@{epoch}"), "--yes"]);
        }
    }
    for (epoch, sum) in &acknowledged {
        assert_eq!(u64::from(checksum(&world.memory(&format!("web1@{epoch}")))), *sum, "epoch {epoch}");
    }
    world.verify();
    world.ok(["rm", "web1", "--yes"]);
    let mut command = world.command(["gc", "run", "--yes", "--orphans-after", "0s"]);
    command.env("EPOCHFS_LOG", "error");
    assert!(command.output().unwrap().status.success());
    assert_eq!(packs(&world), 0);
}

/// So that images need not be kept.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(7, |sum: u32, byte| sum.rotate_left(5).wrapping_mul(31).wrapping_add(u32::from(*byte)))
}

/// What is open on a mount stays readable though it be dropped, and so does what a live lies on; a collector waits for
/// the daemon to say so.
#[test]
fn p4_open_files_and_lives_keep_what_they_need() {
    if !can_mount_or_skip("p4_open_files_and_lives_keep_what_they_need") {
        return;
    }
    let world = World::new();
    three_epochs(&world);
    world.commit("web2", &world.file("memory", pages(5, 200)));
    let mountpoint = Mountpoint::new(&world, "mount");
    world.ok(["mount", "--background", "--no-prefetch", mountpoint.text()]);
    let open = File::open(mountpoint.path.join("web1/epochs/1/memory")).unwrap();
    let live = OpenOptions::new().read(true).write(true).open(mountpoint.path.join("web2/live/memory")).unwrap();
    live.write_all_at(&pages(6, 1), 0).unwrap();
    live.sync_all().unwrap();
    world.ok(["rm", "web1@1", "web1@2", "web2@1", "--yes"]);
    let ran = world.json(["gc", "run", "--yes"]);
    assert_eq!(number(&ran, "deleted"), 1, "{ran:#}");
    // Nothing of these was read before.
    let mut bytes = vec![0; 200 * 4096];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == pages(1, 200));
    live.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..4096] == pages(6, 1) && bytes[4096..] == pages(5, 200)[4096..]);
    drop((open, live));
    assert_eq!(world.json(["commit", "web2"])["changed_pages"], 1);
    assert!(world.memory("web2")[4096..] == pages(5, 200)[4096..]);
    world.ok(["umount", mountpoint.text()]);
    // The daemon has taken its lease back: nobody is waited for.
    let ran = world.json(["gc", "run", "--yes", "--no-wait"]);
    assert_eq!((number(&ran, "deleted"), &ran["done"]), (1, &Value::from(true)), "{ran:#}");
    world.verify();
}

/// Twenty epochs of a page each, besides the first.
fn scattered(world: &World) -> std::path::PathBuf {
    let mut bytes = pages(1, 400);
    let file = world.file("memory", bytes.clone());
    world.commit("web1", &file);
    for number in 0..20 {
        bytes[number * 4096 * 15..][..4096].copy_from_slice(&pages(100 + number as u64, 1));
        world.commit("web1", &world.file("memory", bytes.clone()));
    }
    world.file("memory", bytes)
}

#[test]
fn an_epoch_that_is_scattered_is_stored_again_and_the_rest_given_back() {
    let world = World::new();
    let file = scattered(&world);
    let plan = &world.json(["gc", "compact", "web1"])["machines"][0];
    assert_eq!((&plan["done"], &plan["new_epoch"]), (&false.into(), &Value::Null));
    assert!(number(plan, "moved_objects") >= 20, "{plan:#}");
    assert_eq!(number(&world.json(["show", "web1"]), "epoch"), 21);
    let made = &world.json(["gc", "compact", "web1", "--yes"])["machines"][0];
    assert_eq!((&made["done"], number(made, "new_epoch")), (&true.into(), 22));
    assert_eq!(world.json(["show", "web1@21"])["digest"], world.json(["show", "web1@22"])["digest"]);
    let out = world.path("out");
    world.ok(["export", "web1@22", "--output", out.to_str().unwrap()]);
    assert!(std::fs::read(out.join("memory")).unwrap() == std::fs::read(&file).unwrap());
    // Once is enough.
    let again = &world.json(["gc", "compact", "web1", "--yes"])["machines"][0];
    assert_eq!((number(again, "moved_objects"), &again["done"]), (0, &false.into()));
    world.ok(["prune", "web1", "--keep-last", "1", "--yes"]);
    world.ok(["gc", "run", "--yes"]);
    assert_eq!(world.json(["verify"])["whole"], true);
    world.run(["gc", "compact", "nobody", "--yes"]).code(5);
    world.run(["gc", "compact", "--yes"]).code(2);
    let all = world.json(["gc", "compact", "--all", "--yes"]);
    assert_eq!(all["machines"][0]["machine"], "web1");
}
