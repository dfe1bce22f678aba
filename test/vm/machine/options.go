package machine

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/hugelgupf/vmtest/qemu"
)

// Options describe one guest. The zero value of a field is a working default.
type Options struct {
	Assets Assets
	Name   string // in log lines; "vm"

	// Socket is the vhost-user socket's path. QEMU connects to it, or waits there if Listen is set.
	Socket string
	Listen bool
	// Reconnect lets QEMU dial again, every second, when the back-end goes away.
	Reconnect bool
	// Netdev is QEMU's -netdev argument, with id=n0, where Socket is "": another back-end than vhost-user.
	Netdev string

	MAC         string   // 52:54:00:12:34:56
	QueuePairs  int      // 1
	DeviceProps []string // more properties of virtio-net-pci: "mrg_rxbuf=off", "rx_queue_size=1024"

	CPUs      int // 1
	MemMiB    int // 256
	MaxMemMiB int // room for memory that is plugged in later, in two slots; 0: none

	// AllowReboot lets the guest reboot; without it QEMU ends instead.
	AllowReboot bool
	// User runs QEMU under this user and group id; 0: the caller's own.
	User int
	// Console receives the guest's console, line by line; nil: it is only kept.
	Console func(line string)
	// Timeout ends the guest, whatever it does; 15 minutes, which a whole run of the tests has.
	Timeout time.Duration
}

func (o Options) withDefaults() Options {
	def := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	def(&o.QueuePairs, 1)
	def(&o.CPUs, 1)
	def(&o.MemMiB, 256)
	if o.Name == "" {
		o.Name = "vm"
	}
	if o.MAC == "" {
		o.MAC = "52:54:00:12:34:56"
	}
	if o.Timeout == 0 {
		o.Timeout = 15 * time.Minute
	}
	return o
}

// command is the program with its first arguments. setpriv ends QEMU together with us, even when we are killed. The
// emulated CPU is QEMU's plainest: string instructions of newer ones, which kernels then use for every copy, are emulated
// byte by byte, and traffic is slower by half. RDRAND gives the guest its first random numbers at once.
func (o Options) command() string {
	program := os.Getenv("VMTEST_QEMU")
	if program == "" {
		program = "qemu-system-x86_64 -accel tcg -cpu qemu64,+rdrand"
	}
	wrap := "setpriv --pdeathsig KILL"
	if o.User != 0 {
		wrap += fmt.Sprintf(" --reuid %d --regid %d --clear-groups --no-new-privs", o.User, o.User)
	}
	return wrap + " -- " + program
}

// fns are the options for vmtest. Dir holds the sockets and QEMU's pid file.
func (o Options) fns(dir string, line func(string)) []qemu.Fn {
	args := o.machineArgs()
	args = append(args, o.netArgs()...)
	args = append(args,
		"-pidfile", filepath.Join(dir, pidFile),
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=rpc,path="+filepath.Join(dir, rpcSocket),
		"-device", "virtserialport,chardev=rpc,name="+portName,
		"-chardev", "socket,id=qmp,path="+filepath.Join(dir, qmpSocket),
		"-mon", "chardev=qmp,mode=control")
	if !o.AllowReboot {
		args = append(args, "-no-reboot")
	}
	return []qemu.Fn{
		qemu.WithQEMUCommand(o.command()),
		qemu.WithKernel(o.Assets.Kernel),
		qemu.WithInitramfs(o.Assets.Initramfs),
		// no_timer_check: on a busy host the emulated timer can miss the moment in which the kernel looks whether it works, and the kernel panics.
		qemu.WithAppendKernel("console=ttyS0 quiet panic=-1 nokaslr no_timer_check"),
		qemu.WithVMTimeout(o.Timeout),
		qemu.WithQEMUArgs(args...),
		qemu.LogSerialByLine(line),
		qemu.WithVmtestIdent(),
	}
}

func (o Options) machineArgs() []string {
	mem := strconv.Itoa(o.MemMiB) + "M"
	size := mem
	if o.MaxMemMiB != 0 {
		size += fmt.Sprintf(",slots=2,maxmem=%dM", o.MaxMemMiB)
	}
	return []string{
		"-M", "q35,memory-backend=mem",
		// vhost-user needs memory that can be handed over as a file.
		"-object", "memory-backend-memfd,id=mem,share=on,size=" + mem,
		"-m", size, "-smp", strconv.Itoa(o.CPUs),
		"-nodefaults", "-no-user-config", "-vga", "none", "-serial", "stdio",
	}
}

func (o Options) netArgs() []string {
	netdev := o.Netdev
	var args []string
	if o.Socket != "" {
		chardev := "socket,id=c0,path=" + o.Socket
		if o.Listen {
			chardev += ",server=on,wait=on"
		} else if o.Reconnect {
			chardev += ",reconnect=1"
		}
		args = append(args, "-chardev", chardev)
		netdev = "vhost-user,id=n0,chardev=c0"
		if o.QueuePairs > 1 {
			netdev += ",queues=" + strconv.Itoa(o.QueuePairs)
		}
	}
	if netdev == "" {
		return nil
	}
	// vectors=0: QEMU 7.2 crashes under emulation when a vhost-user device uses MSI-X.
	props := []string{"virtio-net-pci", "netdev=n0", "id=net0", "mac=" + o.MAC, "romfile=", "vectors=0"}
	if o.QueuePairs > 1 {
		props = append(props, "mq=on")
	}
	props = append(props, o.DeviceProps...)
	return append(args, "-netdev", netdev, "-device", strings.Join(props, ","))
}
