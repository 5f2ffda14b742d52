//! Exporting and removing: what must not happen by accident.

use std::ffi::OsStr;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use crate::support::{Ran, World, collect, is_root_or_skip, pages, stream};

fn export(world: &World, epoch: &str, target: &Path, more: &[&str]) -> Ran {
    let words = [OsStr::new("export"), OsStr::new(epoch), OsStr::new("--output"), target.as_os_str()];
    world.run(words.into_iter().chain(more.iter().map(OsStr::new)))
}

fn three_streams() -> World {
    let world = World::new();
    let [a, b, c] = ["a", "b", "dir/c"].map(|name| stream(name, &world.file(name.replace('/', "-"), pages(1, 3))));
    world.ok([OsStr::new("commit"), OsStr::new("web1"), &a, &b, &c]);
    world
}

#[test]
fn existing_files_are_neither_replaced_nor_added_to() {
    let world = three_streams();
    for taken in ["a", "b", "dir/c"] {
        let target = world.path(format!("out-{}", taken.replace('/', "-")));
        std::fs::create_dir_all(target.join("dir")).unwrap();
        std::fs::write(target.join(taken), b"mine").unwrap();
        std::fs::write(target.join("other"), b"too").unwrap();
        export(&world, "web1", &target, &[]).code(4).says(taken).says("nothing is overwritten");
        let mut files = std::collections::BTreeMap::new();
        collect(&target, Path::new(""), &mut files);
        assert_eq!(files.len(), 2, "an export that fails writes nothing: {:?}", files.keys());
        assert_eq!(files[Path::new(taken)], b"mine");
        // The others can be had by name.
        let others: Vec<&str> = ["a", "b", "dir/c"].into_iter().filter(|name| *name != taken).collect();
        export(&world, "web1", &target, &["--stream", others[0], "--stream", others[1]]).code(0);
    }
    let target = world.path("out-link");
    std::fs::create_dir(&target).unwrap();
    std::os::unix::fs::symlink("/nonexistent/elsewhere", target.join("a")).unwrap();
    export(&world, "web1", &target, &[]).code(4).says("nothing is overwritten");
    let target = world.path("out-directory");
    std::fs::create_dir_all(target.join("a")).unwrap();
    export(&world, "web1", &target, &[]).code(4);
    assert!(!target.join("b").exists());
}

#[test]
fn targets_that_cannot_be_used_are_errors() {
    let world = three_streams();
    let file = world.file("file", b"x");
    assert_ne!(export(&world, "web1", &file, &[]).code, 0);
    assert_ne!(export(&world, "web1", &file.join("below"), &[]).code, 0);
    assert_eq!(std::fs::read(&file).unwrap(), b"x");
    let target = world.path("out");
    export(&world, "web1", &target, &["--stream", "no-such-stream"]).code(5).says("no-such-stream");
    assert!(!target.exists(), "nothing is made for a wrong name");
    // A file where a directory must be.
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("dir"), b"x").unwrap();
    assert_ne!(export(&world, "web1", &target, &[]).code, 0);
    assert!(!target.join("a").exists());
}

#[test]
fn a_link_in_the_target_does_not_lead_out_of_it() {
    let world = three_streams();
    let (target, elsewhere) = (world.path("out"), world.path("elsewhere"));
    std::fs::create_dir_all(&target).unwrap();
    std::fs::create_dir_all(&elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, target.join("dir")).unwrap();
    assert_ne!(export(&world, "web1", &target, &[]).code, 0);
    assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);
}

#[test]
fn modes_and_holes_are_kept() {
    let world = World::new();
    for mode in [0o600, 0o644, 0o400, 0o755, 0o000] {
        if mode & 0o400 == 0 && !is_root_or_skip("a file that nobody may read") {
            continue;
        }
        let path = world.file("a", b"x");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        world.commit("web1", &path);
        let target = world.path(format!("out-{mode:o}"));
        export(&world, "web1", &target, &[]).code(0);
        assert_eq!(std::fs::metadata(target.join("memory")).unwrap().mode() & 0o7777, mode);
        std::fs::remove_file(path).unwrap();
    }
    let path = world.path("sparse");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(1 << 30).unwrap();
    file.write_all_at(b"x", 512 << 20).unwrap();
    // Zeros that are written are a hole afterwards.
    file.write_all_at(&[0; 1 << 20], 700 << 20).unwrap();
    world.commit("web1", &path);
    let target = world.path("out");
    export(&world, "web1", &target, &[]).code(0);
    let exported = std::fs::metadata(target.join("memory")).unwrap();
    assert_eq!(exported.len(), 1 << 30);
    assert!(exported.blocks() * 512 <= 64 << 10, "{} blocks", exported.blocks());
    let mut byte = [0];
    std::fs::File::open(target.join("memory")).unwrap().read_exact_at(&mut byte, 512 << 20).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
fn removing_prints_a_plan_and_does_nothing_without_yes() {
    let world = World::new();
    for seed in 0..4 {
        world.commit("web1", &world.file("a", pages(seed, 3)));
    }
    world.commit("web2", &world.file("a", b"x"));
    world.ok(["tag", "web1@2", "golden"]);
    let before = world.snapshot();
    for names in [&["web1@1"][..], &["web1"], &["web1@1", "web1@golden", "web2"], &["web1@latest"]] {
        let ran = world.ok(std::iter::once("rm").chain(names.iter().copied()));
        assert!(ran.stdout.contains("web1"), "{ran:?}");
        ran.says("nothing was done");
        let plan = world.json(std::iter::once("rm").chain(names.iter().copied()));
        assert_eq!(plan["done"], false);
    }
    // One wrong name among right ones stops all of it.
    world.run(["rm", "web1@1", "web1@99", "--yes"]).code(5);
    world.run(["rm", "web1@1", "web3", "--yes"]).code(5);
    world.run(["rm", "--yes"]).code(2);
    assert_eq!(world.snapshot(), before);
    world.ok(["rm", "web1@1", "web1@golden", "web1@1", "--yes"]);
    assert_eq!(world.epochs("web1"), [3, 4]);
    world.run(["show", "web1@golden"]).code(5);
    world.run(["rm", "web1@1", "--yes"]).code(5);
    world.ok(["rm", "web1@4", "--yes"]);
    assert_eq!(world.json(["show", "web1"])["epoch"], 3);
    world.ok(["rm", "web1", "web1@3", "web2", "--yes"]);
    assert!(world.json(["ls"])["machines"].as_array().unwrap().is_empty());
    world.verify();
}
