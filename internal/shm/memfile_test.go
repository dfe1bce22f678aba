package shm

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
)

// Files that could keep whoever touches them waiting are no guest memory, however good a mapping they would make.
func TestMapRefusesFilesThatMayHaveToBeAskedFor(t *testing.T) {
	exe, err := os.Executable() // on a disk, where go test builds
	if err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{
		"disk": exe, "proc": "/proc/self/maps", "directory": filepath.Dir(exe), "device": "/dev/zero", "sysfs": "/sys/kernel/mm/transparent_hugepage/enabled",
	} {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Logf("%s: %v", name, err)
			continue
		}
		var fs unix.Statfs_t
		if err := unix.Fstatfs(fd, &fs); err != nil {
			t.Fatal(err)
		}
		if name == "disk" && fs.Type == unix.TMPFS_MAGIC {
			t.Log("the test was built on tmpfs")
		} else if m, err := Map(fd, 0, 4096); !errors.Is(err, ErrMemoryFile) {
			t.Errorf("%s: %v, want a refusal", name, err)
			if err == nil {
				_ = m.Unmap()
			}
		}
		unix.Close(fd)
	}
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(event)
	if _, err := Map(event, 0, 4096); !errors.Is(err, ErrMemoryFile) {
		t.Errorf("an eventfd: %v, want a refusal", err)
	}
}

// Memory files in the forms that VMMs have them.
func TestMapTakesMemoryFiles(t *testing.T) {
	for name, open := range map[string]func() (int, error){
		"memfd":               func() (int, error) { return unix.MemfdCreate("shm-test", unix.MFD_CLOEXEC) },
		"memfd with seals":    func() (int, error) { return unix.MemfdCreate("shm-test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING) },
		"memfd, not to run":   func() (int, error) { return unix.MemfdCreate("shm-test", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL) },
		"memfd of huge pages": func() (int, error) { return unix.MemfdCreate("shm-test", unix.MFD_CLOEXEC|unix.MFD_HUGETLB) },
		"/dev/shm": func() (int, error) {
			fd, err := unix.Open("/dev/shm", unix.O_RDWR|unix.O_TMPFILE|unix.O_CLOEXEC, 0o600)
			if err != nil {
				require.Skip(t, "shm", "no file in /dev/shm: %v", err)
			}
			return fd, err
		},
	} {
		fd, err := open()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := unix.Ftruncate(fd, 2<<20); err != nil {
			t.Fatal(err)
		}
		m, err := Map(fd, 0, 2<<20)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if err := m.Unmap(); err != nil {
			t.Error(err)
		}
		unix.Close(fd)
	}
}
