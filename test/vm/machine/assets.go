// Package machine boots Linux guests in QEMU and lets the host act inside them.
//
// A guest is a Debian cloud kernel (scripts/setup.sh unpacks it), u-root's init and commands as the initramfs, and the
// agent of test/vm/agent laid over it. vmtest starts and watches QEMU. The host talks to the agent over virtio-serial
// (test/vm/rpc) and to QEMU over QMP; the network device under test carries nothing but the test's traffic.
//
//	Machine --JSON lines--> virtio-serial --> agent      Machine --QMP--> QEMU      vhostd <--vhost-user--> QEMU
//
// Emulation (TCG) is the default, because it works everywhere: set VMTEST_QEMU="qemu-system-x86_64 -accel kvm -cpu host"
// where KVM is to be had. VMTEST_KERNEL and VMTEST_MODULES name another kernel and its lib/modules/VERSION/kernel.
package machine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/u-root/gobusybox/src/pkg/golang"
	"github.com/u-root/mkuimage/uimage"
	"github.com/u-root/uio/llog"
)

// ErrMissing is returned where the host lacks something that scripts/setup.sh brings.
var ErrMissing = errors.New("not there (run scripts/setup.sh)")

// Assets are the files that every guest boots from.
type Assets struct {
	Kernel    string
	Initramfs string
}

// commands are u-root's programs in the guest.
var commands = []string{
	"github.com/u-root/u-root/cmds/core/init",
	"github.com/u-root/u-root/cmds/core/gosh",
	"github.com/u-root/u-root/cmds/core/dhclient",
	"github.com/u-root/u-root/cmds/core/dmesg",
	"github.com/u-root/u-root/cmds/core/ip",
	"github.com/u-root/u-root/cmds/core/ping",
	"github.com/u-root/u-root/cmds/core/wget",
	"github.com/u-root/u-root/cmds/core/cat",
	"github.com/u-root/u-root/cmds/core/ls",
}

// modules are the kernel's, in the order in which they must be loaded.
var modules = []string{
	"drivers/virtio/virtio_ring.ko",
	"drivers/virtio/virtio.ko",
	"drivers/virtio/virtio_pci_legacy_dev.ko",
	"drivers/virtio/virtio_pci_modern_dev.ko",
	"drivers/virtio/virtio_pci.ko",
	"drivers/char/virtio_console.ko",
	"net/core/failover.ko",
	"drivers/net/net_failover.ko",
	"drivers/net/virtio_net.ko",
}

// Prepare finds the kernel and builds the initramfs into dir. The slow part of it, u-root, is built once and kept in
// the cache (.cache in the checkout, or $VHOSTD_CACHE); progress tells of it.
func Prepare(ctx context.Context, dir string, progress func(format string, args ...any)) (Assets, error) {
	if runtime.GOARCH != "amd64" {
		return Assets{}, fmt.Errorf("a guest kernel for %s: %w", runtime.GOARCH, ErrMissing)
	}
	root, err := checkout()
	if err != nil {
		return Assets{}, err
	}
	cache := cacheDir(root)
	kernel, modulesDir, err := findKernel(cache)
	if err != nil {
		return Assets{}, err
	}
	base, err := baseInitramfs(root, cache, progress)
	if err != nil {
		return Assets{}, fmt.Errorf("u-root initramfs: %w", err)
	}
	agent := filepath.Join(dir, "agent")
	if err := BuildGo(ctx, root, agent, "./test/vm/agent"); err != nil {
		return Assets{}, err
	}
	a := Assets{Kernel: kernel, Initramfs: filepath.Join(dir, "initramfs.cpio")}
	if err := layer(a.Initramfs, base, agent, modulesDir, dir); err != nil {
		return Assets{}, fmt.Errorf("guest initramfs: %w", err)
	}
	return a, nil
}

// checkout is the directory of go.mod, above the working directory.
func checkout() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("no go.mod above the working directory")
		}
	}
}

func cacheDir(root string) string {
	if dir := os.Getenv("VHOSTD_CACHE"); dir != "" {
		return dir
	}
	return filepath.Join(root, ".cache")
}

func findKernel(cache string) (kernel, modulesDir string, err error) {
	kernel, modulesDir = os.Getenv("VMTEST_KERNEL"), os.Getenv("VMTEST_MODULES")
	if kernel == "" {
		kernel, modulesDir = filepath.Join(cache, "kernel/vmlinuz"), filepath.Join(cache, "kernel/modules")
	}
	for _, path := range []string{kernel, modulesDir} {
		if _, err := os.Stat(path); err != nil {
			return "", "", fmt.Errorf("guest kernel %s: %w", path, ErrMissing)
		}
	}
	return kernel, modulesDir, nil
}

// BuildGo builds one static program of this module.
func BuildGo(ctx context.Context, root, out, pkg string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", pkg, err, b)
	}
	return nil
}

// baseInitramfs returns the archive with u-root in it, which depends on nothing but go.sum, the Go release and the
// list of commands.
func baseInitramfs(root, cache string, progress func(string, ...any)) (string, error) {
	sum, err := os.ReadFile(filepath.Join(root, "go.sum"))
	if err != nil {
		return "", err
	}
	key := sha256.Sum256(fmt.Appendf(sum, "%s %s", runtime.Version(), strings.Join(commands, " ")))
	base := filepath.Join(cache, "vmtest", "base-"+hex.EncodeToString(key[:8])+".cpio")
	if _, err := os.Stat(base); err == nil {
		return base, nil
	}
	if err := os.MkdirAll(filepath.Dir(base), 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(base), "build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	progress("building u-root for the guest, once: half a minute")
	out := filepath.Join(tmp, "base.cpio")
	err = uimage.Create(quiet(),
		uimage.WithEnv(golang.DisableCGO(), golang.WithGOARCH(runtime.GOARCH)),
		uimage.WithBusyboxCommands(commands...),
		uimage.WithInit("init"), uimage.WithShell("gosh"),
		uimage.WithTempDir(tmp), uimage.WithCPIOOutput(out))
	if err != nil {
		return "", err
	}
	return base, os.Rename(out, base)
}

// layer lays the agent, the modules and, where the host has it, ethtool over the base.
func layer(out, base, agent, modulesDir, tmp string) error {
	mods := []uimage.Modifier{
		uimage.WithBaseFile(base), uimage.WithExistingInit(true),
		uimage.WithFiles(agent + ":bin/agent"),
		uimage.WithUinit("/bin/agent"),
		uimage.WithTempDir(tmp), uimage.WithCPIOOutput(out),
	}
	for i, name := range modules {
		// u-root's init loads /lib/modules/*.ko in the order of their names.
		file := fmt.Sprintf("%s:lib/modules/%02d-%s", filepath.Join(modulesDir, name), i, filepath.Base(name))
		mods = append(mods, uimage.WithFiles(file))
	}
	if ethtool := FindProgram("ethtool"); ethtool != "" {
		mods = append(mods, uimage.WithFiles(ethtool+":bin/ethtool"))
	}
	return uimage.Create(quiet(), mods...)
}

// FindProgram looks in $PATH and where system tools are; "" if it is nowhere.
func FindProgram(name string) string {
	for _, path := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if p, err := exec.LookPath(path); err == nil {
			return p
		}
	}
	return ""
}

// quiet: what goes wrong comes back as an error.
func quiet() *llog.Logger {
	return llog.New(slog.LevelError, llog.WritePrintf(io.Discard))
}
