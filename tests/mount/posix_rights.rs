//! Cases of POSIX about permissions and owners, as other users meet them. They need root, to become others.
//!
//! Linux keeps users by thread: a fresh thread takes another user's rights, and ends with them.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use rustix::fs::{Access, Gid, Timespec, Timestamps, UTIME_NOW, Uid, XattrFlags, access, utimensat};
use rustix::io::Errno;

use crate::posix::{Case, run_on_a_mount, run_on_ext4};
use crate::support::{fails, is_root, rename, skip};

const NOBODY: u32 = 65_534;
const OTHER: u32 = 1_234;
const GROUP: u32 = 4_321;

/// Does something as another user, with a group and further groups.
fn as_user<T: Send>(user: u32, group: u32, groups: &[u32], work: impl FnOnce() -> T + Send) -> T {
    let become_user = || {
        let groups: Vec<Gid> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
        rustix::thread::set_thread_groups(&groups).unwrap();
        let group = Gid::from_raw(group);
        rustix::thread::set_thread_res_gid(group, group, group).unwrap();
        let user = Uid::from_raw(user);
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
    };
    let done = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                become_user();
                work()
            })
            .join()
    });
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    as_user(NOBODY, NOBODY, &[], work)
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// A file with a mode and an owner.
fn file(path: &Path, bits: u32, user: u32, group: u32) {
    fs::write(path, "content").unwrap();
    chown(path, Some(user), Some(group)).unwrap();
    chmod(path, bits);
}

fn directory(path: &Path, bits: u32, user: u32, group: u32) {
    fs::create_dir(path).unwrap();
    chown(path, Some(user), Some(group)).unwrap();
    chmod(path, bits);
}

const DENIED: &[Errno] = &[Errno::ACCESS];
const FORBIDDEN: &[Errno] = &[Errno::PERM];

const CASES: [Case; 14] = [
    ("modes decide who opens", |base| {
        let path = base.join("file");
        for (bits, user, group, reads, writes) in [
            (0o600, 0, 0, false, false),
            (0o644, 0, 0, true, false),
            (0o606, 0, 0, true, true),
            (0o602, 0, 0, false, true),
            (0o600, NOBODY, 0, true, true),
            (0o066, NOBODY, 0, false, false),
            (0o640, 0, NOBODY, true, false),
            (0o604, 0, NOBODY, false, false),
        ] {
            file(&path, bits, user, group);
            let (can_read, can_write, may) = as_nobody(|| {
                let may = (access(&path, Access::READ_OK).is_ok(), access(&path, Access::WRITE_OK).is_ok());
                (File::open(&path).is_ok(), File::options().write(true).open(&path).is_ok(), may)
            });
            assert_eq!((can_read, can_write), (reads, writes), "{bits:o} of {user}:{group}");
            assert_eq!(may, (reads, writes), "access, {bits:o} of {user}:{group}");
            fs::remove_file(&path).unwrap();
        }
    }),
    ("further groups count", |base| {
        let path = base.join("file");
        file(&path, 0o640, 0, GROUP);
        as_user(NOBODY, NOBODY, &[GROUP], || drop(File::open(&path).unwrap()));
        as_nobody(|| fails("open", File::open(&path), DENIED));
    }),
    ("a directory without x hides, and one without r does not list", |base| {
        let hidden = base.join("hidden");
        directory(&hidden, 0o744, 0, 0);
        file(&hidden.join("file"), 0o666, 0, 0);
        directory(&base.join("unlisted"), 0o711, 0, 0);
        file(&base.join("unlisted/file"), 0o666, 0, 0);
        as_nobody(|| {
            fails("stat", fs::metadata(hidden.join("file")), DENIED);
            fails("open", File::open(hidden.join("file")), DENIED);
            assert_eq!(fs::read_dir(&hidden).unwrap().count(), 1);
            fails("list", fs::read_dir(base.join("unlisted")), DENIED);
            fs::read(base.join("unlisted/file")).unwrap();
        });
    }),
    ("a directory without w takes and loses nothing", |base| {
        let closed = base.join("closed");
        directory(&closed, 0o755, 0, 0);
        file(&closed.join("file"), 0o666, NOBODY, NOBODY);
        directory(&closed.join("sub"), 0o777, NOBODY, NOBODY);
        directory(&base.join("open"), 0o777, 0, 0);
        as_nobody(|| {
            fails("create", File::create(closed.join("new")), DENIED);
            fails("mkdir", fs::create_dir(closed.join("new")), DENIED);
            fails("symlink", symlink("x", closed.join("new")), DENIED);
            fails("unlink", fs::remove_file(closed.join("file")), DENIED);
            fails("rmdir", fs::remove_dir(closed.join("sub")), DENIED);
            fails("rename out", rename(&closed.join("file"), &base.join("open/file")), DENIED);
            fs::write(base.join("open/mine"), "x").unwrap();
            fails("rename in", rename(&base.join("open/mine"), &closed.join("mine")), DENIED);
            // What is in it may be written all the same.
            fs::write(closed.join("file"), "changed").unwrap();
        });
        assert_eq!(fs::read(closed.join("file")).unwrap(), b"changed");
    }),
    ("what a user makes is that user's", |base| {
        directory(&base.join("open"), 0o777, 0, 0);
        let (made, sub, link) = (base.join("open/file"), base.join("open/sub"), base.join("open/link"));
        as_user(OTHER, GROUP, &[], || {
            fs::write(&made, "x").unwrap();
            fs::create_dir(&sub).unwrap();
            symlink("file", &link).unwrap();
        });
        for path in [&made, &sub, &link] {
            let status = fs::symlink_metadata(path).unwrap();
            assert_eq!((status.uid(), status.gid()), (OTHER, GROUP), "{}", path.display());
        }
    }),
    ("only the owner changes modes, and root", |base| {
        let path = base.join("file");
        file(&path, 0o666, OTHER, NOBODY);
        as_nobody(|| fails("chmod", fs::set_permissions(&path, Permissions::from_mode(0o777)), FORBIDDEN));
        as_user(OTHER, OTHER, &[], || chmod(&path, 0o600));
        assert_eq!(mode(&path), 0o600);
    }),
    ("only root gives files away", |base| {
        let path = base.join("file");
        file(&path, 0o644, NOBODY, NOBODY);
        as_nobody(|| {
            fails("chown", chown(&path, Some(OTHER), None), FORBIDDEN);
            fails("chgrp", chown(&path, None, Some(GROUP)), FORBIDDEN);
            chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
        });
        as_user(NOBODY, NOBODY, &[GROUP], || chown(&path, None, Some(GROUP)).unwrap());
        let status = fs::metadata(&path).unwrap();
        assert_eq!((status.uid(), status.gid()), (NOBODY, GROUP));
        as_user(OTHER, NOBODY, &[GROUP], || fails("chgrp", chown(&path, None, Some(GROUP)), FORBIDDEN));
        // Of a link itself, too.
        symlink("file", base.join("link")).unwrap();
        std::os::unix::fs::lchown(base.join("link"), Some(OTHER), Some(GROUP)).unwrap();
        let status = fs::symlink_metadata(base.join("link")).unwrap();
        assert_eq!((status.uid(), status.gid(), fs::metadata(&path).unwrap().uid()), (OTHER, GROUP, NOBODY));
    }),
    ("a new owner or writer ends set-user-id", |base| {
        let path = base.join("file");
        file(&path, 0o6755, NOBODY, NOBODY);
        assert_eq!(mode(&path), 0o6755);
        as_user(NOBODY, NOBODY, &[GROUP], || chown(&path, None, Some(GROUP)).unwrap());
        assert_eq!(mode(&path), 0o755);
        chmod(&path, 0o6777);
        as_user(OTHER, OTHER, &[], || {
            File::options().write(true).open(&path).unwrap().write_all_at(b"x", 0).unwrap();
        });
        assert_eq!(mode(&path), 0o777);
        chmod(&path, 0o6777);
        as_user(OTHER, OTHER, &[], || File::options().write(true).open(&path).unwrap().set_len(1).unwrap());
        assert_eq!(mode(&path), 0o777);
        chmod(&path, 0o6777);
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        as_user(OTHER, OTHER, &[], || {
            let file = File::options().write(true).open(&path).unwrap();
            rustix::fs::fallocate(&file, punch, 0, 1).unwrap();
        });
        assert_eq!(mode(&path), 0o777);
        // Who is not in the file's group cannot give it that group's rights.
        file(&path, 0o644, NOBODY, GROUP);
        as_nobody(|| chmod(&path, 0o2755));
        assert_eq!(mode(&path), 0o755);
    }),
    ("in a sticky directory everybody removes their own", |base| {
        let sticky = base.join("sticky");
        directory(&sticky, 0o1777, 0, 0);
        for name in ["theirs", "theirs too", "mine"] {
            file(&sticky.join(name), 0o666, if name == "mine" { NOBODY } else { OTHER }, 0);
        }
        directory(&sticky.join("their directory"), 0o777, OTHER, 0);
        as_nobody(|| {
            fails("unlink", fs::remove_file(sticky.join("theirs")), &[Errno::PERM, Errno::ACCESS]);
            fails("rmdir", fs::remove_dir(sticky.join("their directory")), &[Errno::PERM, Errno::ACCESS]);
            let renamed = rename(&sticky.join("theirs"), &sticky.join("new"));
            fails("rename", renamed, &[Errno::PERM, Errno::ACCESS]);
            let replaced = rename(&sticky.join("mine"), &sticky.join("theirs too"));
            fails("rename over", replaced, &[Errno::PERM, Errno::ACCESS]);
            fs::remove_file(sticky.join("mine")).unwrap();
            fs::write(sticky.join("new"), "x").unwrap();
            rename(&sticky.join("new"), &sticky.join("newer")).unwrap();
        });
        as_user(OTHER, OTHER, &[], || fs::remove_file(sticky.join("theirs")).unwrap());
        // The directory's owner removes whatever is in it.
        chown(&sticky, Some(NOBODY), None).unwrap();
        as_nobody(|| fs::remove_file(sticky.join("theirs too")).unwrap());
    }),
    ("a set-group-id directory hands its group down", |base| {
        let shared = base.join("shared");
        directory(&shared, 0o2777, 0, GROUP);
        as_nobody(|| {
            fs::write(shared.join("file"), "x").unwrap();
            fs::create_dir_all(shared.join("sub/sub")).unwrap();
            symlink("file", shared.join("link")).unwrap();
        });
        for name in ["file", "sub", "sub/sub", "link"] {
            let status = fs::symlink_metadata(shared.join(name)).unwrap();
            assert_eq!((status.uid(), status.gid()), (NOBODY, GROUP), "{name}");
        }
        assert!(mode(&shared.join("sub")) & 0o2000 != 0 && mode(&shared.join("sub/sub")) & 0o2000 != 0);
        assert_eq!(mode(&shared.join("file")) & 0o6000, 0);
    }),
    ("times are set by the owner, or to now by a writer", |base| {
        let path = base.join("file");
        file(&path, 0o666, OTHER, OTHER);
        let times = |nsec| Timestamps {
            last_access: Timespec { tv_sec: 1, tv_nsec: nsec },
            last_modification: Timespec { tv_sec: 1, tv_nsec: nsec },
        };
        let set = |nsec| utimensat(rustix::fs::CWD, &path, &times(nsec), rustix::fs::AtFlags::empty());
        as_nobody(|| {
            fails("a time", set(5), FORBIDDEN);
            set(UTIME_NOW).unwrap();
        });
        as_user(OTHER, OTHER, &[], || set(5).unwrap());
        chmod(&path, 0o644);
        as_nobody(|| fails("now", set(UTIME_NOW), DENIED));
        assert_eq!((fs::metadata(&path).unwrap().mtime(), fs::metadata(&path).unwrap().mtime_nsec()), (1, 5));
    }),
    ("attributes follow the rights to the file", |base| {
        use rustix::fs::{getxattr, lsetxattr, setxattr};
        let path = base.join("file");
        file(&path, 0o644, 0, 0);
        setxattr(&path, "user.name", b"value", XattrFlags::empty()).unwrap();
        as_nobody(|| {
            fails("set", setxattr(&path, "user.name", b"x", XattrFlags::empty()), DENIED);
            assert_eq!(getxattr(&path, "user.name", &mut [0_u8; 16][..]), Ok(5));
        });
        chmod(&path, 0o600);
        as_nobody(|| fails("get", getxattr(&path, "user.name", &mut [0_u8; 16][..]), DENIED));
        symlink("file", base.join("link")).unwrap();
        let on_link = lsetxattr(base.join("link"), "user.name", b"x", XattrFlags::empty());
        fails("on a link", on_link, FORBIDDEN);
    }),
    ("who has a file open keeps the right", |base| {
        let path = base.join("file");
        file(&path, 0o666, 0, 0);
        let opened = as_nobody(|| File::options().read(true).write(true).open(&path).unwrap());
        chmod(&path, 0o600);
        as_nobody(|| {
            fails("open", File::open(&path), DENIED);
            opened.write_all_at(b"still", 0).unwrap();
            opened.sync_all().unwrap();
        });
        assert_eq!(fs::read(&path).unwrap(), b"stillnt");
    }),
    ("a link's own mode is of no matter", |base| {
        file(&base.join("file"), 0o644, 0, 0);
        symlink("file", base.join("link")).unwrap();
        assert_eq!(mode(&base.join("link")), 0o777);
        as_nobody(|| assert_eq!(fs::read(base.join("link")).unwrap(), b"content"));
    }),
];

#[test]
fn posix_rights_hold_on_ext4() {
    if !is_root() {
        return skip("posix_rights_hold_on_ext4", "it needs root");
    }
    run_on_ext4(&CASES);
}

#[test]
fn posix_rights_hold_on_the_mount() {
    if !is_root() {
        return skip("posix_rights_hold_on_the_mount", "it needs root");
    }
    run_on_a_mount("posix_rights_hold_on_the_mount", &CASES);
}
